"""ScienceQA: reading it, its prompts, and scoring answers.

The data set (Lu et al., arXiv 2209.09513) is ``problems.json`` (problems by qid),
``pid_splits.json`` (qids by split) and ``images/<split>/<qid>/image.png``.  Prompts are those that
LaVIN publishes its numbers with (question, context, options; answer, lecture, solution).
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dip.errors import DataError, shown
from megatron_dip.families.data.fields import (
    check_object,
    file_name,
    optional_file_name,
    text_of,
    unread_keys,
)
from megatron_dip.families.lavin.instructions import Instruction
from megatron_dip.reading import read_json

__all__ = [
    "ScienceQa",
    "ScienceQaProblem",
    "ScienceQaScores",
    "answer_text",
    "parse_problem",
    "predicted_choice",
    "prompt_text",
    "read_scienceqa",
    "score",
    "to_instruction",
]

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ANSWER = re.compile(r"The answer is ([A-Z])\.")
_PLAIN_QID = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_KEYS = (
    *("question", "choices", "answer", "hint", "lecture", "solution"),
    *("image", "subject", "grade"),
)
_PUBLISHED_KEYS = ("task", "topic", "category", "skill", "split")
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_LAST_LOWER_GRADE = 6


@dataclass(frozen=True, kw_only=True)
class ScienceQaProblem:
    """One problem with what prompts and scores are made of."""

    qid: str
    question: str
    choices: tuple[str, ...]
    answer: int
    """The place of the right choice."""
    hint: str
    lecture: str
    solution: str
    image: Path | None
    """Relative to the folder of the images."""
    subject: str
    grade: str
    unread: tuple[str, ...] = ()
    """Keys that are not ScienceQA's and say nothing that would be trained."""


@dataclass(frozen=True, kw_only=True)
class ScienceQa:
    """The problems of one split, and why the others of it cannot be used."""

    problems: tuple[ScienceQaProblem, ...]
    errors: tuple[str, ...]


def read_scienceqa(problems: str | Path, splits: str | Path, split: str) -> ScienceQa:
    """The problems of ``split``, in its order; no image is looked at.

    Raises:
        DataError: A file cannot be read or is not of ScienceQA's form, or there is no such split.
    """
    by_qid = read_json(problems, DataError, allow_repeated_keys=True)
    by_split = read_json(splits, DataError)
    for path, content, what in (
        (problems, by_qid, "problems by qid"),
        (splits, by_split, "qids by split"),
    ):
        if not isinstance(content, Mapping):
            found = type(content).__name__
            raise DataError(f"{path}: expected an object of {what}, found {found}")
        check_object(content, str(path))
    if not isinstance(by_split.get(split), list):
        found = shown(sorted(by_split))
        raise DataError(f"{splits}: no split {shown(split)} (expected one of {found})")
    good: list[ScienceQaProblem] = []
    errors: list[str] = []
    for qid in by_split[split]:
        try:
            if isinstance(qid, bool) or not isinstance(qid, (str, int)):
                raise DataError(f"{splits}: split {split!r} holds {shown(qid)}; expected a qid")
            if str(qid) not in by_qid:
                raise DataError(
                    f"{_problem_name(str(qid))}: is in split {split!r} of {splits}, but not in "
                    f"{problems}"
                )
            good.append(parse_problem(str(qid), by_qid[str(qid)], split))
        except DataError as error:
            errors.append(str(error))
    return ScienceQa(problems=tuple(good), errors=tuple(errors))


def parse_problem(qid: str, raw: Any, split: str) -> ScienceQaProblem:
    """The checked form of one problem.

    Raises:
        DataError: A field is missing or of the wrong kind, or the answer is none of the choices.
    """
    name = _problem_name(qid)
    fields = check_object(raw, name)
    unread = unread_keys(fields, _KEYS, name)
    choices = fields.get("choices")
    if not isinstance(choices, list) or not choices or len(choices) > len(_LETTERS):
        raise DataError(f"{name}: field 'choices' is {shown(choices)}; expected a list of texts")
    answer = fields.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(
            f"{name}: answer {shown(answer)} is not the number of a choice (expected 0 to "
            f"{len(choices) - 1})"
        )
    image = optional_file_name(fields, "image", name)
    if image is not None:
        file_name(qid, "qid", name)
    return ScienceQaProblem(
        qid=qid,
        question=text_of(fields, "question", name),
        choices=tuple(_parse_choice(choice, name) for choice in choices),
        answer=answer,
        hint=_optional_text(fields, "hint", name),
        lecture=_optional_text(fields, "lecture", name),
        solution=_optional_text(fields, "solution", name),
        image=None if image is None else Path(split) / qid / image,
        subject=_optional_text(fields, "subject", name),
        grade=_optional_text(fields, "grade", name),
        unread=tuple(key for key in unread if key not in _PUBLISHED_KEYS),
    )


def _problem_name(qid: str) -> str:
    return f"problem {qid if _PLAIN_QID.fullmatch(qid) else shown(qid)}"


def _parse_choice(choice: Any, name: str) -> str:
    """A choice may be a number, as in some problems of arithmetic."""
    if isinstance(choice, (int, float)) and not isinstance(choice, bool):
        choice = str(choice)
    return text_of({"choices": choice}, "choices", name)


def _optional_text(raw: Mapping[str, Any], field: str, name: str) -> str:
    """The text in ``field``; nothing where it is missing, null or blank."""
    value = raw.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return text_of(raw, field, name)


def prompt_text(problem: ScienceQaProblem) -> str:
    """Question, context and options; ends where the answer begins."""
    options = " ".join(
        f"({letter}) {choice}" for letter, choice in zip(_LETTERS, problem.choices, strict=False)
    )
    text = (
        f"Question: {problem.question}\nContext: {problem.hint or 'N/A'}\n"
        f"Options: {options}\nResponse:"
    )
    return text.replace("  ", " ").strip()


def answer_text(problem: ScienceQaProblem) -> str:
    """Answer, lecture and solution; follows the prompt without a space, as published."""
    # Published prompts spell the ends of lines inside explanations out.
    lecture, solution = (text.replace("\n", "\\n") for text in (problem.lecture, problem.solution))
    text = f"The answer is {_LETTERS[problem.answer]}. BECAUSE: {lecture} {solution}"
    return text.replace("  ", " ").strip()


def to_instruction(problem: ScienceQaProblem) -> Instruction:
    """The problem as a sample to be learned."""
    return Instruction(
        name=_problem_name(problem.qid),
        prompt=prompt_text(problem),
        answer=answer_text(problem),
        image=problem.image,
        unread=problem.unread,
    )


def predicted_choice(text: str, num_choices: int) -> int | None:
    """The choice that a model's answer names; None where it names none of them."""
    match = _ANSWER.search(text)
    if match is None:
        return None
    choice = _LETTERS.index(match[1])
    return choice if choice < num_choices else None


@dataclass(frozen=True, kw_only=True)
class ScienceQaScores:
    """Shares of right answers in percent; None where a group has no problem."""

    average: float
    by_group: Mapping[str, float | None]
    """NAT SOC LAN by subject, TXT IMG NO by context, G1-6 G7-12 by grade."""
    num_guessed: int
    """Answers that named no choice, for which one was drawn."""


def score(
    problems: Sequence[ScienceQaProblem], answers: Mapping[str, str], *, seed: int = 0
) -> ScienceQaScores:
    """Score the texts that a model gave, by qid; one that names no choice gets a random one.

    Raises:
        DataError: There are no problems, or an answer is missing; names its problem.
    """
    if not problems:
        raise DataError("no problems to score (expected at least one)")
    missing = [problem.qid for problem in problems if problem.qid not in answers]
    if missing:
        raise DataError(f"problem {missing[0]}: no answer (and {len(missing) - 1} more without)")
    generator = random.Random(seed)
    right: dict[str, list[bool]] = {}
    num_guessed = 0
    for problem in problems:
        choice = predicted_choice(answers[problem.qid], len(problem.choices))
        if choice is None:
            num_guessed += 1
            choice = generator.randrange(len(problem.choices))
        for group in ("all", *_groups(problem)):
            right.setdefault(group, []).append(choice == problem.answer)
    shares = {group: 100.0 * sum(found) / len(found) for group, found in right.items()}
    names = (*_SUBJECTS.values(), "TXT", "IMG", "NO", "G1-6", "G7-12")
    return ScienceQaScores(
        average=shares["all"],
        by_group={name: shares.get(name) for name in names},
        num_guessed=num_guessed,
    )


def _groups(problem: ScienceQaProblem) -> list[str]:
    groups = [_SUBJECTS[problem.subject]] if problem.subject in _SUBJECTS else []
    if problem.hint:
        groups.append("TXT")
    if problem.image is not None:
        groups.append("IMG")
    if not problem.hint and problem.image is None:
        groups.append("NO")
    match = re.search(r"\d+", problem.grade)
    if match:
        groups.append("G1-6" if int(match[0]) <= _LAST_LOWER_GRADE else "G7-12")
    return groups
