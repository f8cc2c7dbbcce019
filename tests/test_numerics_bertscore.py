"""BERTScore numbers against the bert-score package, one pair a call, on small random models of each family."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import load_folder, outputs_of

from gpu_engine.bertscore import Baselines, BertScoreEngine
from gpu_engine.fast_encoder import FastEncoder, disentangled_bias
from gpu_engine.packing import round_rows
from gpu_engine.token_model import CALIBRATION_TEXTS, ModuleEncoder
from gpu_engine.work import BertScoreResult, BertScoreTask, InvalidInput, UnsupportedModel

CPU = torch.device("cpu")
TOLERANCE = 5e-6

PAIRS = [
    ("The cat sat on the mat.", "A cat was sitting on a mat."),
    ("hello world", "hello world"),
    ("the", "a"),
    ("the  quick   brown fox ", "  the quick brown fox"),
    ("", "the cat"),
    ("the cat", ""),
    ("   \t\n", "hello"),
    ("", ""),
    ("\u200b\x00\x01", "the dog"),
    ("日本語 é 🙂🚀 hello", "日本 hello 🙂"),
    ("[CLS] the [SEP] cat </s> <pad> <s>", "the [PAD] cat"),
    ("naïve café — “quotes” … €5", "naive cafe - quotes ... 5"),
    ("The Cat SAT", "the cat sat"),
]
WORDS = tiny_models.WORDS
LONG = [
    (
        " ".join(WORDS[(7 * i + n) % len(WORDS)] for i in range(n)),
        " ".join(WORDS[(3 * i) % len(WORDS)] for i in range(m)),
    )
    for n, m in ((509, 40), (510, 511), (511, 512), (512, 5), (513, 513), (720, 900), (300, 1))
]


FAMILIES = ("bert", "roberta", "deberta", "distilbert", "mpnet", "electra", "albert", "deberta-v2", "t5")
FAMILIES += ("convbert", "mobilebert", "fnet", "big_bird", "xmod")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    made = {
        "bert": tiny_models.save_bert(base / "bert"),
        "roberta": tiny_models.save_roberta(base / "roberta"),
        "deberta": tiny_models.save_deberta(base / "deberta"),
    }
    for kind in FAMILIES[3:]:
        made[kind] = tiny_models.save_other(base / kind, kind)
    return made


def load(folder: Path, **changes: Any) -> BertScoreEngine:
    engine: BertScoreEngine = load_folder("bertscore", folder, **changes)
    return engine


@pytest.fixture(scope="session")
def engines(folders: dict[str, Path]) -> dict[str, BertScoreEngine]:
    return {kind: load(folder) for kind, folder in folders.items()}


def score(
    engine: BertScoreEngine, candidates: Sequence[str], references: Sequence[Any], **more: Any
) -> BertScoreResult:
    groups = [[group] if isinstance(group, str) else group for group in references]
    result: BertScoreResult = outputs_of(engine, engine.prepare(BertScoreTask(candidates, groups, **more)))
    return result


def rows(result: BertScoreResult) -> np.ndarray:
    return np.stack([result.precision, result.recall, result.f1], axis=1)


class Reference:
    """bert-score itself, its tokenising replaced by one that runs on transformers 5."""

    def __init__(self, folder: Path, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from bert_score import utils
        from transformers import AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

        def sent_encode(tokenizer: Any, text: str) -> list[int]:
            text = text.strip()
            if not text:
                return tokenizer("")["input_ids"]
            if isinstance(tokenizer, (GPT2Tokenizer, RobertaTokenizer)):
                text = " " + text
            return tokenizer(text, truncation=True, max_length=512)["input_ids"]

        monkeypatch.setattr(utils, "sent_encode", sent_encode)
        self.utils = utils
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = utils.get_model(str(folder), layers)

    def weights(self, references: list[str] | None) -> dict[int, float]:
        if references is not None:
            return self.utils.get_idf_dict(references, self.tokenizer, nthreads=0)
        ones: dict[int, float] = defaultdict(lambda: 1.0)
        ones[self.tokenizer.sep_token_id] = ones[self.tokenizer.cls_token_id] = 0
        return ones

    def score(self, candidate: str, reference: str, idf_over: list[str] | None = None) -> np.ndarray:
        weights = self.weights(idf_over)
        found = self.utils.bert_cos_score_idf(
            self.model, [reference], [candidate], self.tokenizer, weights, device="cpu", batch_size=1
        )
        return found[0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [None, 1, 4])
def test_scores_equal_bert_score_pair_by_pair(
    family: str, layers: int | None, folders: Any, engines: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    engine = engines[family]
    reference = Reference(folders[family], layers or engine.default_layers, monkeypatch)
    pairs = PAIRS + (LONG if layers is None else LONG[:1])
    ours = rows(score(engine, [c for c, _ in pairs], [r for _, r in pairs], layers=layers))
    theirs = np.stack([reference.score(c, r) for c, r in pairs])
    assert np.isfinite(ours).all()
    # bert-score divides by zero where no token has weight; its F1 is 0 there and so is ours
    np.testing.assert_allclose(ours[:, 2], theirs[:, 2], atol=TOLERANCE)
    np.testing.assert_allclose(ours, np.nan_to_num(theirs), atol=TOLERANCE)
    assert np.ptp(ours[:, 2]) > 0.2, "the random model's scores should spread"


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_idf_weights_equal_bert_score(family: str, folders: Any, engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines[family]
    reference = Reference(folders[family], engine.default_layers, monkeypatch)
    candidates = ["the cat sat", "a dog ran fast under the table", "hello world", "green house"]
    references = [["a cat sat on the mat", "the cat"], ["the dog ran"], ["hello, world!"], ["the sun", "the red house"]]
    flat = [text for group in references for text in group]
    ours = rows(score(engine, candidates, references, idf=True))
    theirs = np.stack(
        [np.stack([reference.score(c, r, flat) for r in group]).max(axis=0) for c, group in zip(candidates, references)]
    )
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_of_several_references_the_best_of_each_measure_counts(engines: Any) -> None:
    engine = engines["bert"]
    options = ["the cat", "the cat sat on the mat under the tree", "sat"]
    single = np.stack([rows(score(engine, ["the cat sat on"], [option]))[0] for option in options])
    together = rows(score(engine, ["the cat sat on"], [options]))[0]
    np.testing.assert_allclose(together, single.max(axis=0), atol=1e-6)
    assert len(set(single.argmax(axis=0))) > 1, "the example should need different references"


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "mpnet", "convbert", "fnet", "big_bird"])
def test_a_pair_scores_the_same_alone_in_any_order_and_beside_any_other(family: str, engines: Any) -> None:
    engine = engines[family]
    pairs = PAIRS + LONG[:3]
    alone = np.concatenate([rows(score(engine, [c], [r])) for c, r in pairs])
    shuffled = list(np.random.default_rng(0).permutation(len(pairs)))
    together = rows(score(engine, [pairs[i][0] for i in shuffled], [pairs[i][1] for i in shuffled]))
    np.testing.assert_allclose(together, alone[shuffled], atol=1e-6)


def test_swapping_sides_swaps_precision_and_recall(engines: Any) -> None:
    candidates, references = zip(*PAIRS)
    forward = score(engines["deberta"], candidates, references)
    backward = score(engines["deberta"], references, candidates)
    np.testing.assert_allclose(forward.precision, backward.recall, atol=1e-6)
    np.testing.assert_allclose(forward.f1, backward.f1, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_identical_texts_score_one(family: str, engines: Any) -> None:
    texts = ["the cat sat on the mat", "hello", "日本語 🙂"]
    assert np.abs(score(engines[family], texts, texts).f1 - 1).max() <= 1e-6


def test_outputs_that_arrive_in_pieces_give_the_same_scores(engines: Any) -> None:
    engine = engines["deberta"]
    candidates, references = zip(*PAIRS)
    whole = rows(score(engine, candidates, references))
    work = engine.prepare(BertScoreTask(candidates, [[r] for r in references]))
    for index in work.order:
        work.absorb([index], engine.run([work.text(index)], work.variant), [0])
        work.landed([index])
    assert not work.matcher.known, "embeddings are let go once their pairs are matched"
    np.testing.assert_allclose(rows(work.result()), whole, atol=1e-6)


def test_truncated_pairs_are_reported(engines: Any) -> None:
    result = score(engines["bert"], ["the cat", LONG[5][0], "a"], ["the", "a", LONG[5][1]])
    assert result.truncated == [1, 2]


def test_the_token_limit_can_be_lowered(folders: Any) -> None:
    engine = load(folders["bert"], max_tokens=16)
    long = score(engine, [" ".join(WORDS[:40])], ["the cat"])
    cut = score(engine, [" ".join(WORDS[:14])], ["the cat"])
    assert long.truncated == [0]
    assert cut.truncated == []
    np.testing.assert_allclose(rows(long), rows(cut), atol=1e-6)


def test_empty_texts_score_zero_with_a_warning(engines: Any) -> None:
    result = score(engines["roberta"], ["", "the cat"], ["the cat", "  "])
    assert not rows(result).any()
    assert any("empty candidate" in text and "(at 0)" in text for text in result.warnings)
    assert any("empty reference" in text and "(at 1)" in text for text in result.warnings)


@pytest.mark.parametrize("references", [["the cat"], ["the cat", "the cat"], [""]])
def test_idf_that_weighs_every_token_zero_is_refused(references: list[str], engines: Any) -> None:
    with pytest.raises(InvalidInput, match="idf"):
        score(engines["bert"], ["the dog"] * len(references), references, idf=True)


def test_a_reference_without_weight_scores_zero_and_says_so(engines: Any) -> None:
    result = score(engines["bert"], ["a cat", "a dog"], ["the", "the dog"], idf=True)
    assert result.recall[0] == 0
    assert result.f1[0] == 0
    assert any("recall" in text for text in result.warnings)


def test_a_layer_above_the_models_is_refused(engines: Any) -> None:
    with pytest.raises(InvalidInput, match=r"num_layers: got 9, the model has 4"):
        score(engines["bert"], ["a"], ["b"], layers=9)


def test_layer_0_is_refused_where_the_models_own_code_cannot_run_it(engines: Any) -> None:
    assert score(engines["bert"], ["a"], ["b"], layers=0).layers == 0
    for family in ("deberta-v2", "xmod"):
        with pytest.raises(InvalidInput, match=r"num_layers: got 0, .* send 1 to 4"):
            score(engines[family], ["a"], ["b"], layers=0)


@pytest.mark.parametrize("family", ["convbert", "mobilebert", "fnet"])
def test_a_module_that_looks_at_padding_gets_none(family: str, engines: Any) -> None:
    assert engines[family].tokens.unpadded
    assert not engines["mpnet"].tokens.unpadded


def test_a_model_without_token_embeddings_is_refused_in_a_sentence(tmp_path: Path) -> None:
    from transformers import CanineConfig, CanineModel, CanineTokenizer

    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    CanineModel(CanineConfig(**size)).save_pretrained(tmp_path)
    CanineTokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="CanineModel has no table of token embeddings"):
        load(tmp_path)


def test_layers_come_from_the_request_the_setting_the_table_or_three_quarters(
    folders: Any, tmp_path: Path, engines: Any
) -> None:
    assert score(engines["bert"], ["a"], ["b"], layers=2).layers == 2
    assert load(folders["bert"], layers=1).default_layers == 1
    assert engines["bert"].default_layers == 3
    table = tiny_models.save_deberta(tmp_path / "deberta-base", layers=12, hidden=16, heads=2)
    assert load(table).default_layers == 9


def test_rescaling_uses_the_row_of_the_layer(tmp_path: Path) -> None:
    engine = load(tiny_models.save_roberta(tmp_path / "roberta-large", layers=18, hidden=16, heads=2))
    assert engine.default_layers == 17
    raw = rows(score(engine, ["the cat", ""], ["a dog", "the"]))
    scaled = rows(score(engine, ["the cat", ""], ["a dog", "the"], rescale=True))
    baseline = np.array([0.83150584, 0.8314941, 0.83122575], np.float32)
    np.testing.assert_allclose(scaled, (raw - baseline) / (1 - baseline), atol=1e-6)
    assert scaled[1, 0] < -4, "empty texts are rescaled after they were set to 0"
    with pytest.raises(InvalidInput, match=r"roberta-large, lang 'xx', layer 17"):
        score(engine, ["a"], ["b"], rescale=True, lang="xx")
    with pytest.raises(InvalidInput):
        score(engine, ["a"], ["b"], rescale=True, lang="../en")


def test_published_baselines_give_the_published_numbers() -> None:
    import bert_score

    folder = Path(bert_score.__file__).parent / "rescale_baseline"
    row = Baselines(folder, "roberta-large", "roberta-large").row("en", 17)
    raw = np.array([0.9843302369, 0.9823839068, 0.9833561182])
    np.testing.assert_allclose((raw - row) / (1 - row), [0.9070008, 0.8954568, 0.9013834], atol=1e-6)
    xlarge = Baselines(folder, "microsoft/deberta-xlarge-mnli", "deberta-xlarge-mnli").row("EN", 40)
    np.testing.assert_allclose(xlarge, [0.5169066, 0.5170288, 0.5150192], atol=1e-7)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "electra"])
def test_the_fast_forward_equals_the_transformers_module(family: str, folders: Any, engines: Any) -> None:
    from transformers import AutoModel

    assert engines[family].tokens.backend.startswith("fused")
    module = AutoModel.from_pretrained(folders[family], dtype=torch.float32).eval()
    ids, _ = engines[family].encode_texts([*CALIBRATION_TEXTS, LONG[1][0], "<pad> the <pad>"])
    tokens = engines[family].tokens
    fast = tokens._texts(FastEncoder(module, torch.float32, CPU), ids, 4)
    slow = tokens._texts(ModuleEncoder(module, torch.float32, CPU), ids, 4)
    for ours, theirs in zip(fast, slow):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kinds", ["c2p", "p2c", "c2p|p2c"])
def test_deberta_variants_agree_or_fall_back(kinds: str, tmp_path: Path) -> None:
    folder = tiny_models.save_deberta(
        tmp_path / "model", pos_att_type=kinds, position_biased_input=True, type_vocab_size=2
    )
    assert load(folder).tokens.backend.startswith("fused")


def test_relative_distances_beyond_the_span_are_clamped_as_transformers_does(tmp_path: Path) -> None:
    folder = tiny_models.save_deberta(tmp_path / "model", max_relative_positions=8)
    assert load(folder).tokens.backend.startswith("fused")


def test_the_skewed_view_reads_the_column_of_each_distance() -> None:
    tokens, heads, dim, longest = 5, 2, 3, 7
    q, k = torch.randn(2, heads, tokens, dim), torch.randn(2, heads, tokens, dim)
    by_distance = torch.randn(2 * longest - 1, heads, dim)
    keys, queries = (torch.cat([table, torch.zeros(1, heads, dim)]) for table in (by_distance.flip(0), by_distance))
    keys, queries = keys.permute(1, 2, 0).contiguous(), queries.permute(1, 2, 0).contiguous()
    bias = disentangled_bias(q, k, tokens, keys=keys, queries=queries)
    for i in range(tokens):
        for j in range(tokens):
            position = by_distance[i - j + longest - 1]  # (heads, dim)
            expected = (q[:, :, i] * position).sum(-1) + (k[:, :, j] * position).sum(-1)
            torch.testing.assert_close(bias[:, :, i, j], expected, atol=1e-5, rtol=1e-5)


def test_scores_are_finite_for_every_family(engines: Any) -> None:
    for engine in engines.values():
        found = rows(score(engine, ["the cat", "x"], ["a dog", "日本"]))
        assert all(math.isfinite(value) for value in found.ravel())


def test_texts_of_many_pairs_are_encoded_first_so_that_the_others_are_let_go(engines: Any) -> None:
    engine = engines["bert"]
    references = [f"{word} {other} and some more words" for word in WORDS[:8] for other in WORDS[:4]]
    work = engine.prepare(BertScoreTask(["the cat"], [references]))
    assert work.order[0] == 0, "the candidate, although it is the shortest"
    held = 0
    for index in work.order:
        work.absorb([index], engine.run([work.text(index)], work.variant), [0])
        held = max(held, len(work.matcher.known))
        work.landed([index])
    assert held <= 2


def test_padding_stops_at_the_models_last_position(tmp_path: Path) -> None:
    """500 positions are no multiple of eight; the padded forward must not read a 504th."""
    from transformers import AutoModel, BertConfig, BertModel

    folder = tiny_models.save_bert(tmp_path / "model")
    config = BertConfig.from_pretrained(folder, max_position_embeddings=500)
    tiny_models.spread(BertModel(config), 1).save_pretrained(folder)
    engine = load(folder)
    assert engine.tokenize.max_tokens == 500
    ids, _ = engine.encode_texts([LONG[5][0], "the cat"])
    module = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    slow = engine.tokens._texts(ModuleEncoder(module, torch.float32, CPU), ids, 3)
    assert [len(rows) for rows in slow] == [500, 4]


def test_ids_beyond_the_embedding_are_the_callers_error_not_the_devices(engines: Any) -> None:
    tokens = engines["bert"].tokens
    with pytest.raises(InvalidInput, match="no embedding"):
        list(tokens.blocks([np.array([0, tokens.vocabulary], np.int32)], 1))


def test_a_text_of_no_tokens_at_all_gives_no_block(engines: Any) -> None:
    tokens = engines["bert"].tokens
    blocks = list(tokens.blocks([np.zeros(0, np.int32), np.array([2, 3], np.int32)], 1))
    assert [list(block.indexes) for block in blocks] == [[1]]
    assert not list(tokens.blocks([np.zeros(0, np.int32)], 1))


def test_packed_batches_come_in_few_sizes() -> None:
    """oneDNN keeps memory for every number of rows it has seen: without rounding a soak grows by 600 MB."""
    sizes = {round_rows(rows) for rows in range(1, 2049)}
    assert len(sizes) <= 48
    assert all(rows <= round_rows(rows) <= max(rows * 1.25, rows + 7) for rows in range(1, 2049))


def test_rows_beyond_the_texts_change_nothing(engines: Any) -> None:
    for family in ("bert", "roberta", "deberta"):
        engine = engines[family]
        ids = engine.encode_texts(["the cat sat on", "a dog"])[0]
        assert round_rows(sum(map(len, ids))) > sum(map(len, ids))
        alone = [engine.tokens._texts(engine.tokens.encoder(torch.float32), [row], 3)[0] for row in ids]
        for one, together in zip(alone, engine.tokens._texts(engine.tokens.encoder(torch.float32), ids, 3)):
            torch.testing.assert_close(one, together, atol=1e-5, rtol=1e-5)
