"""The photographs that ship inside scikit-image, and what is to be seen on them.

Only files that are part of the installed package are named: nothing is downloaded.  Origins are
those that scikit-image documents for each of them.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_dip.errors import DataError

__all__ = ["PHOTOS", "Photo", "photo_folder"]


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photograph: its file, what it shows, and where it comes from."""

    file: str
    subject: str
    """A noun phrase, as an answer gives it."""
    details: tuple[tuple[str, str], ...]
    """Questions about what is known of the whole photograph, with their answers."""
    origin: str


def photo_folder() -> Path:
    """Where the photographs are.

    Raises:
        DataError: scikit-image is not installed.
    """
    found = find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "scikit-image is not installed, and its photographs make the sample data; "
            "install megatron-dip[data]"
        )
    return Path(found.submodule_search_locations[0]) / "data"


PHOTOS = (
    Photo(
        file="astronaut.png",
        subject="the astronaut Eileen Collins in an orange flight suit",
        details=(
            ("Who is the person?", "Eileen Collins, an American astronaut of NASA."),
            (
                "What did she fly?",
                "She first piloted the space shuttle in 1995, on the mission STS-63.",
            ),
        ),
        origin="NASA Great Images database; public domain",
    ),
    Photo(
        file="brick.png",
        subject="a small section of a brick wall",
        details=(
            ("What is the surface made of?", "It is made of bricks with mortar between them."),
        ),
        origin="CC0Textures (Bricks25); CC0",
    ),
    Photo(
        file="camera.png",
        subject="a man with a camera on a tripod on a lawn",
        details=(
            (
                "What is the man doing?",
                "He looks through a camera that stands on a tripod, with buildings behind him.",
            ),
        ),
        origin="photograph by Lav Varshney; CC0",
    ),
    Photo(
        file="cell.png",
        subject="a single cell floating in saline",
        details=(
            (
                "How was it taken?",
                "It is a quantitative phase image, retrieved from a digital hologram.",
            ),
        ),
        origin="Paul Müller and others, Optics Express 26(8), 2018; CC0",
    ),
    Photo(
        file="chelsea.png",
        subject="a cat named Chelsea, seen from close by",
        details=(
            ("Which animal is it?", "It is a cat with whiskers and striped fur."),
            ("What is the cat called?", "Chelsea."),
        ),
        origin="photograph by Stefan van der Walt; CC0",
    ),
    Photo(
        file="clock_motion.png",
        subject="a wall clock, blurred by the motion of the camera",
        details=(
            ("Why is it not sharp?", "The camera moved sideways while the photograph was taken."),
        ),
        origin="photograph by Stefan van der Walt; public domain",
    ),
    Photo(
        file="coffee.png",
        subject="a cup of coffee on a saucer on a wooden table",
        details=(
            ("What is in the cup?", "There is coffee in the cup."),
            ("What is the table made of?", "It is made of wood with a coarse grain."),
        ),
        origin="photograph by Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0",
    ),
    Photo(
        file="coins.png",
        subject="Greek coins from Pompeii in rows on a gray background",
        details=(("Where are the coins from?", "They are Greek coins that come from Pompeii."),),
        origin="Brooklyn Museum Collection; no known copyright restrictions",
    ),
    Photo(
        file="grass.png",
        subject="grass, seen from above",
        details=(("What grows there?", "Grass covers the whole ground."),),
        origin="DeviantArt, linolafett, Grass-01; CC0",
    ),
    Photo(
        file="gravel.png",
        subject="gravel, many small stones",
        details=(("What lies on the ground?", "Gravel: many small stones of different shapes."),),
        origin="CC0Textures (Gravel04); CC0",
    ),
    Photo(
        file="hubble_deep_field.jpg",
        subject="the Hubble eXtreme Deep Field with thousands of galaxies",
        details=(
            (
                "What is special about it?",
                "It is the farthest view of the universe of the Hubble Space Telescope.",
            ),
            ("Who took it?", "It was captured by NASA with the Hubble Space Telescope."),
        ),
        origin="NASA, HubbleSite 2012/37; public domain",
    ),
    Photo(
        file="ihc.png",
        subject="stained tissue with colonic glands under a microscope",
        details=(
            (
                "What do the colors mean?",
                "Brown shows the protein FHL2, stained with DAB; blue is hematoxylin.",
            ),
        ),
        origin="Center for Microscopy And Molecular Imaging; no known copyright restrictions",
    ),
    Photo(
        file="microaneurysms.png",
        subject="a detail of a retina with small lesions and vessels",
        details=(("What are the dark dots?", "They are microaneurysms, small lesions."),),
        origin="High-Resolution Fundus Image Database, given by Andreas Maier; CC0",
    ),
    Photo(
        file="moon.png",
        subject="the surface of the moon with craters",
        details=(("Which celestial body is it?", "It is the moon; the image has low contrast."),),
        origin="distributed with scikit-image",
    ),
    Photo(
        file="motorcycle_left.png",
        subject="a red motorcycle in a garage, the left image of a stereo pair",
        details=(("What color is the motorcycle?", "It is red, with black and chrome parts."),),
        origin="Middlebury 2014 stereo benchmark, Scharstein and others",
    ),
    Photo(
        file="motorcycle_right.png",
        subject="a red motorcycle in a garage, the right image of a stereo pair",
        details=(("Where does the motorcycle stand?", "In a garage, before shelves with boxes."),),
        origin="Middlebury 2014 stereo benchmark, Scharstein and others",
    ),
    Photo(
        file="page.png",
        subject="a scanned page of printed text about segmentation",
        details=(("What does the heading say?", "It says: Region-based segmentation."),),
        origin="distributed with scikit-image",
    ),
    Photo(
        file="retina.jpg",
        subject="a human retina with its vessels, seen through the pupil",
        details=(("Which organ is it?", "It is the retina of a healthy left human eye."),),
        origin="Mikael Häggström, WikiJournal of Medicine 1 (2), 2014; CC0",
    ),
    Photo(
        file="rocket.jpg",
        subject="a Falcon 9 rocket on its launch pad at dusk",
        details=(
            ("What did the rocket carry?", "It carried the satellite DSCOVR."),
            ("Where does it stand?", "At Launch Complex 40 of Cape Canaveral in Florida."),
        ),
        origin="SpaceX Photos; public domain",
    ),
    Photo(
        file="text.png",
        subject="formulas written by hand on ruled paper",
        details=(("Is it printed?", "No, it is written by hand, and turned sideways."),),
        origin="Wikipedia, File:Corner.png; public domain",
    ),
)
