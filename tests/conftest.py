"""Fixtures that tests share: tiny real models, a byte-level tokenizer, a silent run."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from .s3_server import BUCKET, S3Server, s3_server

TINY_VOCAB = 258
EOS_ID, PAD_ID = 256, 257


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place on every kind of store."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://{BUCKET}/{secrets.token_hex(8)}"
    return "memory://" if request.param == "memory" else str(tmp_path / "store")


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer's folder."""
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def byte_tokenizer(folder: Path) -> Path:
    """Save a byte-level tokenizer with a chat template: ids 0-255 are bytes, 256 ends, 257 pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == TINY_VOCAB
    assert tokenizer.eos_token_id == EOS_ID
    return folder


def make_tiny_model(folder: Path, tokenizer_folder: Path, *, seed: int, **changes: object) -> Path:
    """A random two-layer Llama in Hugging Face format, its distributions far from uniform."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    arguments = {
        "vocab_size": TINY_VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "eos_token_id": EOS_ID,
        "bos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig(**arguments))
    with torch.no_grad():  # so that some completions end, and others are cut off
        model.get_output_embeddings().weight[EOS_ID] *= 1.5
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """A tiny student."""
    return make_tiny_model(tmp_path_factory.mktemp("student"), tiny_tokenizer_folder, seed=1)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """A tiny teacher that shares the student's token ids."""
    return make_tiny_model(tmp_path_factory.mktemp("teacher"), tiny_tokenizer_folder, seed=2)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors on one thread: threads that wait for busy cores cost a hundredfold."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
