"""A llama model of a quarter of a megabyte with random weights: real enough for llama.cpp to load and to complete with."""

from pathlib import Path

import gguf
import numpy as np

_DIM, _FF, _HEADS, _LAYERS = 64, 128, 4, 2


def write(path: Path, canary: str) -> None:
    """Write the model; `canary` stands in its metadata, where a scan of memory finds it."""
    random = np.random.default_rng(7)
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256)), "▁".encode()]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256, gguf.TokenType.NORMAL]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_description(canary)
    writer.add_context_length(256)
    writer.add_embedding_length(_DIM)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FF)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_DIM // _HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([int(kind) for kind in types])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def weights(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.05).astype(np.float16))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(_DIM, np.float32))

    weights("token_embd.weight", len(tokens), _DIM)
    ones("output_norm.weight")
    # Only printable bytes are ever chosen: the server answers 500 to what is not UTF-8.
    output = (random.standard_normal((len(tokens), _DIM)) * 0.05).astype(np.float16)
    output[[index for index in range(len(tokens)) if not 32 <= index - 3 < 127]] = 0
    writer.add_tensor("output.weight", output)
    for layer in range(_LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            ones(f"blk.{layer}.{name}.weight")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights(f"blk.{layer}.{name}.weight", _DIM, _DIM)
        weights(f"blk.{layer}.ffn_gate.weight", _FF, _DIM)
        weights(f"blk.{layer}.ffn_up.weight", _FF, _DIM)
        weights(f"blk.{layer}.ffn_down.weight", _DIM, _FF)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
