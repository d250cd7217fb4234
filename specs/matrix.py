"""The schema of a support matrix of another system (specs/matrices/*.yaml): its rows, its columns, what it had."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from specs.errors import SpecRTError
from specs.fields import Texts
from specs.node import Int, Node, Text
from specs.yaml_loader import load_yaml

VERSION = 1
FOLDER = Path(__file__).parent / "matrices"


class Row(Node):
    """One row: the model of ours that stands in it, and the columns that the other system had there."""

    title: ClassVar[str] = "a row"
    spec: Text = Field(description="a spec in specs/models")
    size: Text = Field(description="the published size that memory and speed are told for")
    had: Texts = Field(description="the precisions that the system supported")


class Matrix(Node):
    """A table of models and precisions, with the GPU generations that it was about."""

    title: ClassVar[str] = "a support matrix"
    matrix: Int = Field(description=f"version of this schema: {VERSION}")
    name: Text = Field(description="the file's name")
    title_text: Text = Field(alias="title")
    source: Text
    precisions: Texts
    gpus: Texts
    rows: dict[str, Row]


def matrix_names() -> tuple[str, ...]:
    """The matrices that come with SpecRT, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_matrix(name: str) -> Matrix:
    """A matrix by name; raises SpecRTError VAL-009 for another, SPEC-0xx for a wrong file."""
    if name not in matrix_names():
        raise SpecRTError("VAL-009", f"unknown matrix `{name}`", hint=f"known: {', '.join(matrix_names())}")
    matrix: Matrix = Matrix.model_validate(load_yaml(FOLDER / f"{name}.yaml"))
    return matrix
