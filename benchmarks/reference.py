"""The libraries the service is measured against, loaded once, with what they need on transformers 5.

`bert_score` 0.3.13 asks its tokenizer for things that transformers 5 no longer has, or no longer accepts: a
tokenizer without `model_max_length` overflows, an empty string raises. Only its tokenising is replaced here;
its batches, its model and its matching run as published.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bert_score import BERTScorer
    from sentence_transformers import SentenceTransformer

MAX_TOKENS = 512


def load_sentence_transformer(model_dir: Path, device: str) -> SentenceTransformer:
    """The published embedding library, as its documentation uses it."""
    quiet_libraries()
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(model_dir), device=device)


def export_onnx(model_dir: Path) -> bytes:
    """The encoder with its mean pooling and normalising, as one ONNX graph of any batch and length."""
    quiet_libraries()
    import io

    import torch
    from transformers import AutoModel

    class MeanPooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(model_dir, dtype=torch.float32)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = self.encoder(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids))[0]
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1))

    ids = torch.full((2, 8), 1000)
    free = {0: "texts", 1: "tokens"}
    with io.BytesIO() as file:
        torch.onnx.export(  # dynamo's graph of this model is a tenth slower
            MeanPooled().eval(), (ids, torch.ones_like(ids)), file, dynamo=False, opset_version=18,
            input_names=["ids", "mask"], output_names=["vectors"], dynamic_axes={"ids": free, "mask": free},
        )  # fmt: skip
        return file.getvalue()


def load_bert_scorer(model_dir: Path, num_layers: int, device: str, dtype: str = "float32") -> BERTScorer:
    """The published scorer, its model loaded once and kept, float32 unless told otherwise."""
    quiet_libraries()
    import bert_score
    import bert_score.utils
    import torch

    bert_score.utils.sent_encode = encode_sentence
    scorer = bert_score.BERTScorer(model_type=str(model_dir), num_layers=num_layers, device=device)
    scorer._model.to(getattr(torch, dtype))
    return scorer


def encode_sentence(tokenizer: Any, sentence: str) -> list[int]:
    """bert-score's `sent_encode` for the tokenizers used here, which want no space in front of the text."""
    max_tokens = min(tokenizer.model_max_length, MAX_TOKENS)
    token_ids: list[int] = tokenizer(sentence.strip(), truncation=True, max_length=max_tokens)["input_ids"]
    return token_ids


def quiet_libraries() -> None:
    """No progress bars and no advice on the terminal of a benchmark."""
    import transformers

    libraries_log: Any = transformers.logging
    libraries_log.set_verbosity_error()
    libraries_log.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def make_deberta_shape(target: Path, tokenizer_from: Path, layers: int) -> Path:
    """Write a model of deberta-xlarge-mnli's shape with seeded random weights, float32, and return `target`.

    Only the layers that scoring uses (40 of its 48) are written. Biases are drawn too, because zero biases
    would hide a mistake in folding them. The tokenizer is the small model's: lengths are what matters here.
    """
    if (target / "complete").exists():
        return target
    import shutil

    import torch
    from transformers import DebertaConfig, DebertaModel

    torch.manual_seed(0)
    model = DebertaModel(DebertaConfig(**DEBERTA_XLARGE_SHAPE, num_hidden_layers=layers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.02)
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (tokenizer_from / file).exists():
            shutil.copy(tokenizer_from / file, target / file)
    (target / "complete").touch()
    return target


# config.json of microsoft/deberta-xlarge-mnli, without its layers
DEBERTA_XLARGE_SHAPE: dict[str, Any] = {
    "vocab_size": 50265,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "pos_att_type": "c2p|p2c",
    "pad_token_id": 0,
}
