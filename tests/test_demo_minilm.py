"""The converter, on a BERT of two tiny layers with random weights; real weights are for `test_demo_run.py`."""

import json
from pathlib import Path

import gguf
import numpy
import pytest
from safetensors.numpy import load_file, save_file

from agent.demo import minilm

HIDDEN, INNER, LAYERS, POSITIONS, TOKEN_TYPES = 8, 16, 2, 32, 2
CONFIG = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": POSITIONS,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
    "type_vocab_size": TOKEN_TYPES,
}
# U+2028 is a token of the real vocabulary's kind: one line of the file, although Unicode calls it a line separator.
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##ten", "[", "]", "\u2028"]


def shape(source: str) -> tuple[int, ...]:
    """As BERT has it: rows are outputs, columns inputs."""
    if "LayerNorm" in source or source.endswith("bias"):
        return (INNER,) if "intermediate" in source else (HIDDEN,)
    if "_embeddings." in source:
        rows = {"word": len(VOCABULARY), "position": POSITIONS, "token_type": TOKEN_TYPES}
        return rows[source.removeprefix("embeddings.").removesuffix("_embeddings.weight")], HIDDEN
    if "intermediate" in source:
        return INNER, HIDDEN
    return (HIDDEN, HIDDEN) if "attention" in source else (HIDDEN, INNER)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    random = numpy.random.default_rng(1)
    names = [source for source, _ in minilm.tensor_names(LAYERS)]
    save_file(
        {name: random.standard_normal(shape(name)).astype(numpy.float32) for name in names}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return tmp_path


def test_every_tensor_arrives_with_its_values(checkpoint: Path, tmp_path: Path) -> None:
    minilm.convert(checkpoint, tmp_path / "model.gguf")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    written = load_file(checkpoint / "model.safetensors")
    assert len(read) == len(written) == 5 + LAYERS * 16
    for source, name in minilm.tensor_names(LAYERS):
        numpy.testing.assert_allclose(read[name].data, written[source], rtol=1e-3, atol=1e-3)


def test_matrices_are_halved_and_what_is_added_to_activations_is_not(checkpoint: Path, tmp_path: Path) -> None:
    minilm.convert(checkpoint, tmp_path / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["token_embd.weight"] == types["blk.1.ffn_down.weight"] == "F16"
    assert types["position_embd.weight"] == types["token_types.weight"] == types["blk.1.ffn_down.bias"] == "F32"


def test_the_vocabulary_is_respelled_and_special_tokens_keep_their_place(checkpoint: Path, tmp_path: Path) -> None:
    minilm.convert(checkpoint, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokens == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2581cat", "ten", "\u2581[", "\u2581]", "\u2581\u2028"]
    assert reader.fields["tokenizer.ggml.token_type"].contents() == [3] * 5 + [1] * 5
    ids = [reader.fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "seperator", "mask")]
    assert ids == [2, 3, 4]


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    minilm.convert(checkpoint, tmp_path / "one.gguf")
    minilm.convert(checkpoint, tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_the_packaged_checkpoint_is_found_without_importing_its_package() -> None:
    assert (minilm.packaged_checkpoint() / "model.safetensors").stat().st_size > 80_000_000
