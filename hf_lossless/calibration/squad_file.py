"""The official files of SQuAD v1.1 and v2, which nest questions in paragraphs in articles, as one question a row.

{"data": [{"paragraphs": [{"context": .., "qas": [{"id": .., "question": .., "answers": [..]}]}]}]}
"""

from collections.abc import Iterator, Mapping
from typing import Any

import datasets


def one_question_a_row(rows: datasets.Dataset) -> datasets.Dataset:
    """The questions of an official file, with the columns that SQuAD has on the Hub; other rows as they are."""
    if "data" not in rows.column_names:
        return rows
    articles = list(_articles(rows))
    if not all(isinstance(article, Mapping) and "paragraphs" in article for article in articles):
        return rows
    return datasets.Dataset.from_list(
        [
            {
                "id": question["id"],
                "question": question["question"],
                "context": paragraph["context"],
                "answers": {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")},
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    )


def _articles(rows: datasets.Dataset) -> Iterator[Any]:
    """Datasets reads the list of articles as one row, or as a row for each article."""
    for row in rows:
        yield from row["data"] if isinstance(row["data"], list) else [row["data"]]
