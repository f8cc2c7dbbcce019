"""What is answered with a number and still means little: the answer says so, and says nothing where all is well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny_models
import torch
from conftest import load_folder, settings
from live import LiveService, serving

from gpu_engine.bertscore import Baselines
from gpu_engine.model_files import find_embedded
from gpu_engine.tokenizing import TextTokenizer
from gpu_engine.work import BertScoreTask, EmbedTask
from gpu_service import Settings

CPU = torch.device("cpu")
THAI, EMOJI, ENGLISH = "สวัสดีครับ ผม", "😀 🎉", "The cat sat on the mat."
UNKNOWN = "more than half of the {}'s tokens are unknown to the model: the result means little"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveService]:
    with serving(settings()) as service:
        yield service


def post(live: LiveService, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{live.url}{path}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


# --- texts that the model can't read -------------------------------------------------------------------


def test_pairs_with_a_text_of_unknown_tokens_are_named_by_side_and_index(live: LiveService) -> None:
    references = [["🚀"], [ENGLISH, THAI], [ENGLISH]]
    answer = post(live, "/bertscore", candidates=[EMOJI, ENGLISH, THAI], references=references)
    assert answer["warnings"] == [
        f"{UNKNOWN.format('candidate')} (at 0, 2)",
        f"{UNKNOWN.format('reference')} (at 0, 1)",
    ]


def test_texts_of_unknown_tokens_are_named_by_index(live: LiveService) -> None:
    answer = post(live, "/embed", texts=[THAI, ENGLISH, EMOJI, THAI, ""])
    assert answer["warnings"] == [f"{UNKNOWN.format('text')} (at 0, 2, 3)"]
    compared = post(live, "/similarity", source=EMOJI, texts=[ENGLISH, THAI])
    assert compared["warnings"] == [UNKNOWN.format("source"), f"{UNKNOWN.format('text')} (at 1)"]
    assert post(live, "/similarity", source=ENGLISH, texts=[THAI])["warnings"] == [f"{UNKNOWN.format('text')} (at 0)"]


@pytest.mark.parametrize("text", [ENGLISH, "", "[CLS] [SEP] [PAD]", "Привет, мир", "party 😀", "naïve café — “x”"])
def test_texts_that_the_model_can_read_are_not_warned_of(live: LiveService, text: str) -> None:
    assert "warnings" not in post(live, "/embed", texts=[text])
    assert "warnings" not in post(live, "/similarity", source=text, texts=[text])
    assert not [w for w in post(live, "/bertscore", candidates=[text], references=[text])["warnings"] if "unkn" in w]


def test_the_answers_of_other_dialects_have_no_warnings(live: LiveService) -> None:
    assert set(post(live, "/v1/embeddings", input=THAI)) == {"object", "data", "model", "usage", "truncated"}
    assert "warnings" not in post(live, "/v1/rerank", query=THAI, documents=[THAI])


def test_a_prompt_that_the_model_can_read_does_not_hide_a_text_that_it_cannot() -> None:
    folder = find_embedded("sentence-transformers/all-MiniLM-L6-v2")
    assert folder is not None
    engine = load_folder("embed", folder)
    engine.prompts["query"] = "Represent this sentence for searching: "
    assert engine.prepare(EmbedTask([ENGLISH, THAI], prompt_name="query")).unknown == {1}


def tokenizer_of(model: Any, *, unknown: str, **special: str) -> TextTokenizer:
    """A tokenizer that splits at blanks, each word after SentencePiece's boundary."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown, **special), 32)


def test_the_boundary_that_sentencepiece_writes_before_an_unknown_word_is_no_token() -> None:
    from tokenizers.models import Unigram

    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("▁cat", -2.0)]
    tokenize = tokenizer_of(Unigram(pieces, unk_id=1), unknown="<unk>", pad_token="<pad>")
    rows = tokenize([THAI, "cat cat 日本", "cat", "cat 日本"])[0]
    assert rows[0].tolist() == [2, 1, 2, 1]
    assert tokenize.mostly_unknown(rows, 0) == {0}


def test_an_unknown_token_that_is_also_the_end_of_a_text_tells_nothing() -> None:
    from tokenizers.models import WordLevel

    vocabulary = {"<|endoftext|>": 0, "▁cat": 1}
    tokenize = tokenizer_of(
        WordLevel(vocabulary, unk_token="<|endoftext|>"), unknown="<|endoftext|>", eos_token="<|endoftext|>"
    )
    rows = tokenize(["cat", "日 本 語"])[0]
    assert rows[1].tolist() == [0, 0, 0]
    assert tokenize.mostly_unknown(rows, 0) == set()
    assert tokenize.mostly_unknown([], 0) == set()


def test_a_tokenizer_of_bytes_knows_every_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenize = TextTokenizer(AutoTokenizer.from_pretrained(tiny_models.save_roberta(tmp_path / "roberta")), 64)
    rows = tokenize([THAI, EMOJI, ""])[0]
    assert tokenize.mostly_unknown(rows, 2) == set()


# --- lang ----------------------------------------------------------------------------------------------


def doubts(model: str | None, shown: str, lang: str) -> list[str]:
    from bert_score.utils import lang2model

    return Baselines(Path(), model, shown, dict(lang2model), lang2model.default_factory()).language_warnings(lang)


@pytest.mark.parametrize(
    ("model", "lang", "suggested"),
    [
        ("microsoft/deberta-xlarge-mnli", "th", "bert-base-multilingual-cased"),
        ("microsoft/deberta-xlarge-mnli", "zh-CN", "bert-base-chinese"),
        ("roberta-large", "TR", "dbmdz/bert-base-turkish-cased"),
        (None, "de_DE", "bert-base-multilingual-cased"),
        ("bert-base-chinese", "en", "roberta-large"),
        ("bert-base-chinese", "ja", "bert-base-multilingual-cased"),
        ("dbmdz/bert-base-turkish-cased", "en-sci", "allenai/scibert_scivocab_uncased"),
    ],
)
def test_a_language_that_is_not_the_models_is_warned_of_with_the_model_that_bert_score_takes(
    model: str | None, lang: str, suggested: str
) -> None:
    shown = model or "all-MiniLM-L6-v2"
    more = f"unless {shown} knows this language, send model_type={suggested!r}, as bert-score does"
    assert doubts(model, shown, lang) == [f"lang {lang!r} chooses only the rescaling baseline, not the model: {more}"]


@pytest.mark.parametrize(
    ("model", "shown", "lang"),
    [
        ("microsoft/deberta-xlarge-mnli", "deberta-xlarge-mnli", "en"),
        ("microsoft/deberta-xlarge-mnli", "deberta-xlarge-mnli", "en-US"),
        ("roberta-large", "roberta-large", "en-sci"),
        ("allenai/scibert_scivocab_uncased", "allenai/scibert_scivocab_uncased", "en"),
        (None, "all-MiniLM-L6-v2", "EN"),
        ("bert-base-chinese", "bert-base-chinese", "zh-Hant"),
        ("dbmdz/bert-base-turkish-cased", "my-turkish", "tr"),
        ("bert-base-multilingual-cased", "bert-base-multilingual-cased", "th"),
        ("xlm-roberta-large", "xlm-roberta-large", "de"),
        (None, "paraphrase-multilingual-MiniLM-L12-v2", "zh"),
        (None, "microsoft/mdeberta-v3-base", "ja"),
    ],
)
def test_a_language_of_the_model_is_not_warned_of(model: str | None, shown: str, lang: str) -> None:
    assert doubts(model, shown, lang) == []


def test_the_answer_warns_of_a_language_that_was_sent_and_of_none_that_was_not(live: LiveService) -> None:
    pair = {"candidates": [ENGLISH], "references": [ENGLISH]}
    (warning,) = post(live, "/bertscore", **pair, lang="de")["warnings"]
    assert warning.startswith("lang 'de' chooses only the rescaling baseline, not the model")
    for more in ({}, {"lang": "en"}, {"lang": None}):
        assert post(live, "/bertscore", **pair, **more)["warnings"] == []


def test_a_model_of_one_language_is_not_doubted_where_no_language_was_sent(tmp_path: Path) -> None:
    folder = tiny_models.save_bert(tmp_path / "bert-base-chinese", layers=8, hidden=16, heads=2)
    engine = load_folder("bertscore", folder)
    seen = {
        lang: engine.prepare(BertScoreTask([""], [[""]], lang=lang)).result().warnings for lang in (None, "zh", "en")
    }
    assert seen[None] == seen["zh"]
    assert seen["en"][0].startswith("lang 'en' chooses only")


# --- hash ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
def test_the_hash_is_the_packages_own(tmp_path: Path, idf: bool, rescale: bool) -> None:
    from bert_score.utils import get_hash

    folder = tiny_models.save_roberta(tmp_path / "roberta-large", layers=4, hidden=16, heads=2)
    config = Settings(torch_device="cpu", model_bertscore=str(folder), gpu_dtype="float32")
    with serving(config) as service:
        body = {"candidates": ["a cat", "a dog"], "references": ["the cat", "a sun"], "num_layers": 2}
        answer = post(service, "/bertscore", **body, idf=idf, rescale_with_baseline=rescale)
    assert answer["hash"] == get_hash("roberta-large", 2, idf, rescale, False, False)
    assert np.isfinite(answer["f1"]).all()
