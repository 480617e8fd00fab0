"""Word and character error rates over a corpus, as jiwer counts them."""

import dataclasses
from collections.abc import Sequence

import jiwer


@dataclasses.dataclass(frozen=True)
class ErrorRate:
    """Edits that turn references into hypotheses, counted in words or in characters.

    Counts of parts of a corpus add up to those of the whole: ``total += ErrorRate.of_words(references, hypotheses)``.
    """

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_length: int = 0

    @classmethod
    def of_words(cls, references: Sequence[str], hypotheses: Sequence[str]) -> "ErrorRate":
        """Count word edits, sentence by sentence; words are what stands between spaces.

        Raises:
          ValueError: there are not as many hypotheses as references.
        """
        references, hypotheses = _pairs(references, hypotheses)
        return cls._of(jiwer.process_words(references, hypotheses))

    @classmethod
    def of_characters(cls, references: Sequence[str], hypotheses: Sequence[str]) -> "ErrorRate":
        """Count character edits, sentence by sentence; spaces count, but not those at either end.

        Raises:
          ValueError: there are not as many hypotheses as references.
        """
        references, hypotheses = _pairs(references, hypotheses)
        return cls._of(jiwer.process_characters(references, hypotheses))

    @classmethod
    def _of(cls, output: jiwer.WordOutput | jiwer.CharacterOutput) -> "ErrorRate":
        length = output.hits + output.substitutions + output.deletions
        return cls(output.substitutions, output.deletions, output.insertions, length)

    def __add__(self, other: "ErrorRate") -> "ErrorRate":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return ErrorRate(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @property
    def errors(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits per word or character of the references. It exceeds 1 when much is inserted.

        Where all references are empty it is the number of insertions: 0 only if nothing was recognised.
        """
        return self.errors / max(self.reference_length, 1)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word edits of the whole corpus over the words of all references (not a mean over sentences).

    Empty references are allowed. See :attr:`ErrorRate.rate`.

    Raises:
      ValueError: there are not as many hypotheses as references.
    """
    return ErrorRate.of_words(references, hypotheses).rate


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character edits of the whole corpus over the characters of all references, spaces included.

    Empty references are allowed. See :attr:`ErrorRate.rate`.

    Raises:
      ValueError: there are not as many hypotheses as references.
    """
    return ErrorRate.of_characters(references, hypotheses).rate


def _pairs(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[list[str], list[str]]:
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise TypeError("references and hypotheses must be lists of strings, not one string")
    references, hypotheses = list(references), list(hypotheses)
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references cannot be compared with {len(hypotheses)} hypotheses")
    return references, hypotheses
