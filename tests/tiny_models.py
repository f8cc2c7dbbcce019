"""Small random encoders with real tokenizers, saved to disk as the loading code expects to find them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = (  # noqa: SIM905
    "the a cat dog sat on mat under table and ran fast slow red blue green house tree sun moon water fire "
    "hello world quick brown fox jumps over lazy not very it is was were be been being he she they we you "
    "data model test score text token long short one two three four five six seven eight nine ten"
).split()


def _bytes_to_unicode() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, as tokenizers' ByteLevel alphabet."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _wordpiece_vocabulary() -> list[str]:
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    pieces = [*WORDS, *letters, *(f"##{c}" for c in letters), "##ing", "##ed", "日", "本", "語", "é"]
    return list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]))


def _byte_bpe(special: list[str]) -> tuple[dict[str, int], list[str]]:
    """A byte-level BPE: all bytes, and merges that build some words with and without a leading space."""
    alphabet = _bytes_to_unicode()
    vocabulary = list(dict.fromkeys([*special, *alphabet]))
    merges: list[str] = []
    known = set(vocabulary)
    for word in [*(f"Ġ{w}" for w in WORDS), *WORDS]:
        left = word[0]
        for letter in word[1:]:
            merge = f"{left} {letter}"
            left += letter
            if left not in known:
                known.add(left)
                vocabulary.append(left)
                merges.append(merge)
    return {piece: index for index, piece in enumerate(vocabulary)}, merges


def spread(model: Any, seed: int) -> Any:
    """Random weights wide enough that scores spread, biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_bert(folder: Path, *, layers: int = 4, hidden: int = 48, heads: int = 4) -> Path:
    """A BERT with a WordPiece tokenizer."""
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _wordpiece_vocabulary()
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * hidden, max_position_embeddings=512,
    )  # fmt: skip
    spread(BertModel(config), 1).save_pretrained(folder)
    return folder


def save_roberta(folder: Path, *, layers: int = 4, hidden: int = 48, heads: int = 4) -> Path:
    """A RoBERTa with a byte-level BPE tokenizer."""
    from transformers import RobertaConfig, RobertaModel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = _byte_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer = {"tokenizer_class": "RobertaTokenizer", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = RobertaConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * hidden, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
        bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    spread(RobertaModel(config), 2).save_pretrained(folder)
    return folder


def save_deberta(folder: Path, *, layers: int = 4, hidden: int = 48, heads: int = 4, **changes: Any) -> Path:
    """A DeBERTa v1 with the switches of deberta-xlarge-mnli, whose tokenizer states no maximum length."""
    from transformers import DebertaConfig, DebertaModel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = _byte_bpe(["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"])
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "DebertaTokenizer"}))
    values: dict[str, Any] = dict(  # noqa: C408
        vocab_size=len(vocabulary), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * hidden, max_position_embeddings=512, type_vocab_size=0, pad_token_id=1,
        relative_attention=True, pos_att_type="c2p|p2c", position_biased_input=False, layer_norm_eps=1e-7,
    )  # fmt: skip
    spread(DebertaModel(DebertaConfig(**{**values, **changes})), 3).save_pretrained(folder)
    return folder


def save_other(folder: Path, kind: str) -> Path:
    """Encoders that run through transformers' own modules, all on the WordPiece tokenizer."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _wordpiece_vocabulary()
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    size = {"vocab_size": len(vocabulary), "pad_token_id": 0}
    encoder = dict(  # noqa: C408
        hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96
    )
    configs: dict[str, Any] = {
        "distilbert": lambda: transformers.DistilBertConfig(dim=48, n_layers=4, n_heads=4, hidden_dim=96, **size),
        "mpnet": lambda: transformers.MPNetConfig(
            max_position_embeddings=514, **encoder, **{**size, "pad_token_id": 1}
        ),
        "electra": lambda: transformers.ElectraConfig(embedding_size=32, **encoder, **size),
        "albert": lambda: transformers.AlbertConfig(embedding_size=32, **encoder, **size),
        "t5": lambda: transformers.T5Config(
            d_model=48, d_kv=12, d_ff=96, num_layers=4, num_decoder_layers=1, num_heads=4, **size
        ),
        "deberta-v2": lambda: transformers.DebertaV2Config(
            relative_attention=True, pos_att_type="c2p|p2c", position_biased_input=False, position_buckets=32,
            norm_rel_ebd="layer_norm", share_att_key=True, type_vocab_size=0, **encoder, **size,
        ),
        "convbert": lambda: transformers.ConvBertConfig(embedding_size=48, conv_kernel_size=3, **encoder, **size),
        "mobilebert": lambda: transformers.MobileBertConfig(
            embedding_size=48, intra_bottleneck_size=48, true_hidden_size=48, **encoder, **size
        ),
        "fnet": lambda: transformers.FNetConfig(**encoder, **size),
        "bart": lambda: transformers.BartConfig(
            d_model=48, encoder_layers=4, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=512, **size,
        ),
        "big_bird": lambda: transformers.BigBirdConfig(block_size=8, num_random_blocks=1, **encoder, **size),
        "xmod": lambda: transformers.XmodConfig(
            default_language="en_XX", max_position_embeddings=514, **encoder, **{**size, "pad_token_id": 1}
        ),
    }  # fmt: skip
    spread(transformers.AutoModel.from_config(configs[kind]()), 4).save_pretrained(folder)
    return folder
