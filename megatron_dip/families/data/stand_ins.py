"""What training reads in the place of a file that went bad after the index was made.

The index has decoded every file, so that a sample with a bad one is known before training.  A file
may still be exchanged, deleted or damaged after that.  The batch cannot leave the sample out then:
all ranks plan by its sizes, and only some read its pixels.  So the run ends with a line that names
sample and file; or, where bad samples are skipped, a blank image or silence of the same size takes
its place, with a warning for each.  Many in a row end the run in any case: then it is not a file
that is bad, but the folder that is gone.
"""

import logging
from collections.abc import Callable

from megatron_dip.errors import DataError

__all__ = ["StandIns"]

_MOST_IN_A_ROW = 10

logger = logging.getLogger(__name__)


class StandIns:
    """Reads files during training.

    Args:
        allowed: Whether blank ones may take the place of bad ones.
    """

    def __init__(self, *, allowed: bool) -> None:
        self._allowed = allowed
        self._num_in_a_row = 0

    def read[T](self, sample: str, read: Callable[[], T], blank: Callable[[], T]) -> T:
        """What ``read`` returns; what ``blank`` returns where the file of ``sample`` is bad.

        Raises:
            DataError: The file is bad and must be good, or too many were bad one after the other.
        """
        try:
            value = read()
        except DataError as error:
            self._num_in_a_row += 1
            if not self._allowed:
                raise DataError(
                    f"{sample}: {error}; it was good when the index was made: start again, and the "
                    f"index is made again"
                ) from error
            if self._num_in_a_row == _MOST_IN_A_ROW:
                raise DataError(
                    f"{sample}: {error}; {_MOST_IN_A_ROW} files in a row were good when the index "
                    f"was made and are bad now: look after their folder, and start again"
                ) from error
            logger.warning(
                "%s: %s; it was good when the index was made, and is trained with a blank in its "
                "place",
                sample,
                error,
            )
            return blank()
        self._num_in_a_row = 0
        return value
