"""Models whose answer shows that exactly the sealed bytes were served: after every character comes its successor.

Nothing is trained, and nothing but these files can give that answer: "abc" is continued by "defgh…".
"""

import json

import numpy
from numpy.typing import NDArray
from safetensors.numpy import save

_HIDDEN = 256  # 4 heads of 64: vLLM on CPUs is healthy with smaller heads, and dies on its first request
_HEADS = 4
_INTERMEDIATE = 64
_VOCABULARY = 256


def successor_llama() -> dict[str, bytes]:
    """A Hugging Face folder of a llama of one layer, in which only embedding and output rows matter; tokens are bytes.

    Attention and MLP add zero, so the last state is the embedding of the last token; the output row of token t + 1 is the
    embedding of token t, and random rows of 256 numbers are next to orthogonal.
    """
    random = numpy.random.default_rng(7)
    embedding = random.standard_normal((_VOCABULARY, _HIDDEN), dtype=numpy.float32)
    layer: dict[str, NDArray[numpy.float32]] = {
        f"self_attn.{name}_proj": numpy.zeros((_HIDDEN, _HIDDEN), numpy.float32) for name in "qkvo"
    }
    layer |= {f"mlp.{name}_proj": numpy.zeros((_INTERMEDIATE, _HIDDEN), numpy.float32) for name in ("gate", "up")}
    layer["mlp.down_proj"] = numpy.zeros((_HIDDEN, _INTERMEDIATE), numpy.float32)
    layer |= {f"{name}_layernorm": numpy.ones(_HIDDEN, numpy.float32) for name in ("input", "post_attention")}
    weights = {f"model.layers.0.{name}.weight": value for name, value in layer.items()}
    weights["model.embed_tokens.weight"] = embedding
    weights["model.norm.weight"] = numpy.ones(_HIDDEN, numpy.float32)
    weights["lm_head.weight"] = numpy.roll(embedding, 1, axis=0)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": _VOCABULARY,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": _byte_vocabulary(), "merges": []},
    }
    texts = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256},
    }
    files = {name: json.dumps(text).encode() for name, text in texts.items()}
    return files | {"model.safetensors": save(weights, {"format": "pt"})}


def successor_repository(name: str, body: str = "") -> dict[str, bytes]:
    """A Triton model repository with one model of the Python backend.

    Args:
        name: of the model.
        body: Python statement at the start of every request.
    """
    config = """
        backend: "python"
        max_batch_size: 0
        input [{ name: "text_input" data_type: TYPE_STRING dims: [1] }]
        output [{ name: "text_output" data_type: TYPE_STRING dims: [1] }]
        instance_group [{ kind: KIND_CPU }]
    """
    program = f"""
import os, pathlib
import numpy
import triton_python_backend_utils as backend

class TritonPythonModel:
    def initialize(self, _):
        self.successor = pathlib.Path(__file__).with_name("successor.bin").read_bytes()

    def execute(self, requests):
        {body or "pass"}
        texts = [backend.get_input_tensor_by_name(request, "text_input").as_numpy() for request in requests]
        answers = [numpy.array([text[0].translate(self.successor)], dtype=object) for text in texts]
        return [backend.InferenceResponse([backend.Tensor("text_output", answer)]) for answer in answers]
"""
    return {
        f"{name}/config.pbtxt": config.encode(),
        f"{name}/1/model.py": program.encode(),
        f"{name}/1/successor.bin": bytes((byte + 1) % 256 for byte in range(256)),
    }


def _byte_vocabulary() -> dict[str, int]:
    """The 256 characters by which byte-level BPE writes bytes, each with its byte as token id."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte) if byte in printable else chr(256 + others.index(byte)): byte for byte in range(256)}
