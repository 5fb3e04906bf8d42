"""The official files of SQuAD, as datasets reads them."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_lossless import DataError
from hf_lossless.data.rows import load_rows

VERSION_1 = [
    {
        "title": "one",
        "paragraphs": [
            {
                "context": "red blue",
                "qas": [
                    {"id": "a", "question": "first?", "answers": [{"text": "red", "answer_start": 0}]},
                    {"id": "b", "question": "last?", "answers": [{"text": "blue", "answer_start": 4}] * 2},
                ],
            },
            {"context": "green", "qas": []},
        ],
    },
    {
        "title": "two",
        "paragraphs": [
            {
                "context": "grey",
                "qas": [{"id": "c", "question": "what?", "answers": [{"text": "grey", "answer_start": 0}]}],
            }
        ],
    },
]
ROWS = [
    {"id": "a", "question": "first?", "context": "red blue", "answers": {"text": ["red"], "answer_start": [0]}},
    {"id": "b", "question": "last?", "context": "red blue", "answers": {"text": ["blue"] * 2, "answer_start": [4, 4]}},
    {"id": "c", "question": "what?", "context": "grey", "answers": {"text": ["grey"], "answer_start": [0]}},
]


def version_2() -> list[dict[str, Any]]:
    articles = json.loads(json.dumps(VERSION_1))
    [question] = articles[1]["paragraphs"][0]["qas"]
    question |= {"answers": [], "is_impossible": True, "plausible_answers": [{"text": "grey", "answer_start": 0}]}
    return articles


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("version", ["1.1", "v2.0"])
def test_one_question_a_row(version: str, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    path.write_text(
        json.dumps({"version": version, "data": VERSION_1 if version == "1.1" else version_2()}, indent=indent)
    )
    unanswerable = {**ROWS[2], "answers": {"text": [], "answer_start": []}}
    assert load_rows(str(path)).to_list() == [*ROWS[:2], ROWS[2] if version == "1.1" else unanswerable]


def test_other_columns_of_that_name_stay(tmp_path: Path) -> None:
    rows = [{"data": "w5", "label": 0}, {"data": "w6", "label": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_rows(str(tmp_path / "rows.jsonl")).to_list() == rows


def test_a_file_without_answers(tmp_path: Path) -> None:
    articles = [{"paragraphs": [{"context": "red", "qas": [{"id": "a", "question": "what?"}]}]}]
    (tmp_path / "test.json").write_text(json.dumps({"data": articles}))
    with pytest.raises(DataError, match=r"test\.json' cannot be read: 'answers'\. Give a json"):
        load_rows(str(tmp_path / "test.json"))
