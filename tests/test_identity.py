"""Keys, seeds and fingerprints: the same everywhere, different for whatever matters."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdcache.errors import ModelError
from opdcache.identity import (
    FileHashes,
    canonical_json,
    derived_seed,
    digest,
    key_of,
    model_fingerprint,
    model_vocab_size,
    vocabulary_difference,
    vocabulary_fingerprint,
    weight_files,
)
from opdcache.schemas.manifests import RolloutIdentity, Sampling, ScoreIdentity

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("aAzé "), inner),
    max_leaves=6,
)

IN_ANOTHER_PROCESS = """
from opdcache.identity import derived_seed, key_of, vocabulary_fingerprint
from opdcache.schemas.manifests import ScoreIdentity, ScoreRequirement
need = ScoreRequirement(teacher="t", rendering="as-sampled", dtype="float32", k=4, mass=1,
    num_ids=9, step=0.1,
    columns=["topk", "entropy", "sampled", "student_topk"])
print(key_of(ScoreIdentity(content="c", teacher="t", rendering="as-sampled", dtype="float32", k=4,
    mass=1, num_ids=9, step=0.1, columns=tuple(sorted(need.columns)))))
print(derived_seed(7, 2, "prompt", 3))
print(vocabulary_fingerprint({w: ord(w) for w in {"a", "b", "c", "d", "e"}}))
"""


def score_identity(**changes: object) -> ScoreIdentity:
    fields: dict[str, object] = {
        "content": "c" * 64,
        "teacher": "t" * 64,
        "rendering": "as-sampled",
        "dtype": "bfloat16",
        "columns": ("sampled", "topk"),
        "k": 16,
        "mass": 1.0,
        "num_ids": 8,
        "step": 1 / 256,
    }
    return ScoreIdentity.model_validate(fields | changes)


def rollout_identity(**changes: object) -> RolloutIdentity:
    fields: dict[str, object] = {
        "student": "s" * 64,
        "vocabulary": "v" * 64,
        "eos_token_id": 2,
        "prompts": "p" * 64,
        "labels": "l" * 64,
        "seeds": "0" * 64,
        "num_requests": 8,
        "sampling": {},
        "engine": {"dtype": "bfloat16"},
        "student_topk": 16,
    }
    return RolloutIdentity.model_validate(fields | changes)


def model(folder: Path, **config: object) -> Path:
    """Files of a model, as far as its fingerprint reads them."""
    folder.mkdir()
    stated = {"vocab_size": 8, "hidden_size": 4, "transformers_version": "5.0", **config}
    (folder / "config.json").write_text(json.dumps(stated))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "_name_or_path": "x"}')
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 64)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"\1" * 64)
    return folder


def fingerprint(folder: Path) -> str:
    return model_fingerprint(folder, FileHashes())


def test_keys_and_seeds_are_the_same_in_every_process() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "4242")
    }

    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 3


def test_canonical_json_has_sorted_keys_no_spaces_and_plain_utf8() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ö": "x y", "n": -0.5}}

    assert canonical_json(value) == '{"a":{"n":-0.5,"ö":"x y"},"b":[1,2.5,null,true]}'.encode()


@settings(max_examples=30, deadline=None)
@given(json_values)
def test_canonical_json_reads_back_as_the_same_value(value: object) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_canonical_json_does_not_depend_on_the_order_of_insertion(value: dict[str, int]) -> None:
    turned = dict(reversed(value.items()))

    assert canonical_json(turned) == canonical_json(value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_canonical_json_refuses_numbers_that_json_has_not(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json([number])


def test_a_digest_is_the_sha256_of_the_canonical_form() -> None:
    assert digest([1, "a"]) == hashlib.sha256(b'[1,"a"]').hexdigest()


def test_a_key_is_the_digest_of_the_stored_preimage() -> None:
    identity = score_identity()

    stored = json.loads(identity.model_dump_json())
    form = json.dumps(stored, sort_keys=True, separators=(",", ":"))
    assert key_of(identity) == hashlib.sha256(form.encode()).hexdigest()


def test_a_score_key_changes_with_every_field_of_its_identity() -> None:
    changes: dict[str, object] = {
        "schema_version": 2,
        "content": "d" * 64,
        "teacher": "u" * 64,
        "rendering": "own",
        "dtype": "float32",
        "arguments": {"quantization": "fp8"},
        "columns": ("sampled",),
        "k": 17,
        "mass": 0.99,
        "num_ids": 9,
        "step": 1 / 128,
        "draws": 8,
        "draw_seed": 1,
    }
    assert set(changes) == set(ScoreIdentity.model_fields)

    keys = {key_of(score_identity(**{name: value})) for name, value in changes.items()}

    assert len(keys | {key_of(score_identity())}) == len(changes) + 1


def test_a_rollout_key_changes_with_every_field_of_its_identity() -> None:
    changes: dict[str, object] = {
        "schema_version": 2,
        "student": "a" * 64,
        "vocabulary": "a" * 64,
        "eos_token_id": 3,
        "prompts": "a" * 64,
        "labels": "a" * 64,
        "seeds": "a" * 64,
        "num_requests": 9,
        "sampling": {"temperature": 0.7},
        "engine": {"dtype": "float32"},
        "student_topk": 0,
    }
    assert set(changes) == set(RolloutIdentity.model_fields)

    keys = {key_of(rollout_identity(**{name: value})) for name, value in changes.items()}

    assert len(keys | {key_of(rollout_identity())}) == len(changes) + 1


def test_a_rollout_key_changes_with_every_sampling_parameter() -> None:
    changes: dict[str, object] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "max_tokens": 7,
        "stop": ["\n"],
    }
    assert set(changes) == set(Sampling.model_fields)

    keys = {key_of(rollout_identity(sampling={name: value})) for name, value in changes.items()}

    assert len(keys | {key_of(rollout_identity())}) == len(changes) + 1


def test_every_completion_of_a_run_has_a_seed_of_its_own() -> None:
    places = [
        (seed, round_index, prompt, sample)
        for seed in (0, 1)
        for round_index in (-1, 0, 1, 11)
        for prompt in ("", "1", "11", "a", "a/1")
        for sample in (0, 1, 11)
    ]

    seeds = {derived_seed(*place) for place in places}

    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_file_hashes_are_sha256_in_the_order_asked(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("b", "a", "c")]
    for path in paths:
        path.write_bytes(path.name.encode() * 3)

    expected = [hashlib.sha256(path.name.encode() * 3).hexdigest() for path in paths]
    assert FileHashes().of(paths) == expected


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    file, memory = tmp_path / "weights", tmp_path / "memory" / "hashes.json"
    file.write_bytes(b"one")
    first = FileHashes(memory).of([file])
    stat = file.stat()
    file.write_bytes(b"two")  # behind its back: same size, same time
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert FileHashes(memory).of([file]) == first


def test_a_file_with_another_time_is_hashed_again(tmp_path: Path) -> None:
    file, memory = tmp_path / "weights", tmp_path / "hashes.json"
    file.write_bytes(b"one")
    stat = file.stat()
    FileHashes(memory).of([file])
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))

    assert FileHashes(memory).of([file]) == [hashlib.sha256(b"two").hexdigest()]


def test_a_file_with_another_size_is_hashed_again(tmp_path: Path) -> None:
    file, memory = tmp_path / "weights", tmp_path / "hashes.json"
    file.write_bytes(b"one")
    stat = file.stat()
    FileHashes(memory).of([file])
    file.write_bytes(b"three")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert FileHashes(memory).of([file]) == [hashlib.sha256(b"three").hexdigest()]


def test_a_model_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    assert fingerprint(model(tmp_path / "a")) == fingerprint(model(tmp_path / "b"))


def test_a_fingerprint_changes_with_one_byte_of_any_weight_file(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    prints = {fingerprint(folder)}
    for file in weight_files(folder):
        original = file.read_bytes()
        file.write_bytes(original[:-1] + b"\7")
        prints.add(fingerprint(folder))
        file.write_bytes(original)

    assert len(prints) == 3


def test_a_fingerprint_changes_with_the_configuration(tmp_path: Path) -> None:
    assert fingerprint(model(tmp_path / "a")) != fingerprint(
        model(tmp_path / "b", rope_theta=1000.0)
    )


def test_a_fingerprint_changes_with_the_ids_that_end_a_completion(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    before = fingerprint(folder)

    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')

    assert fingerprint(folder) != before


def test_a_fingerprint_does_not_change_with_the_library_that_saved_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    other = model(tmp_path / "b", transformers_version="9.9", _name_or_path="elsewhere")
    (other / "generation_config.json").write_text(
        '{"transformers_version": "9.9", "eos_token_id": 2}'
    )

    assert fingerprint(folder) == fingerprint(other)


def test_a_fingerprint_does_not_change_with_files_beside_the_model(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    before = fingerprint(folder)

    (folder / "README.md").write_text("hello")
    (folder / "pytorch_model.bin").write_bytes(b"a second copy in the old format")

    assert fingerprint(folder) == before


def test_a_missing_model_folder_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        fingerprint(tmp_path / "nowhere")


def test_a_folder_without_weights_is_a_model_error(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    for file in weight_files(folder):
        file.unlink()

    with pytest.raises(ModelError, match="no weights"):
        fingerprint(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_broken_configuration_is_a_model_error(tmp_path: Path, text: str) -> None:
    folder = model(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(ModelError, match=r"config\.json is not"):
        fingerprint(folder)


@pytest.mark.parametrize("text", ["{", "\udcff"])
def test_a_broken_generation_configuration_is_a_model_error(tmp_path: Path, text: str) -> None:
    folder = model(tmp_path / "m")
    (folder / "generation_config.json").write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(ModelError, match=r"generation_config\.json is not"):
        fingerprint(folder)


def test_equal_vocabularies_do_not_differ_whatever_their_order() -> None:
    assert vocabulary_difference({"a": 0, "b": 1}, {"b": 1, "a": 0}) is None


def test_a_vocabulary_difference_names_the_first_id_and_both_tokens() -> None:
    said = vocabulary_difference({"a": 0, "b": 1, "c": 2}, {"a": 0, "x": 1, "y": 2, "z": 3})

    assert said == (
        "3 ids differ, 3 tokens against 4; the first is id 1: 'b' for the student, "
        "'x' for the teacher"
    )


def test_a_token_that_one_side_lacks_is_a_difference() -> None:
    said = vocabulary_difference({"a": 0}, {"a": 0, "b": 1})

    assert said is not None
    assert said.startswith("1 ids differ")


def test_a_vocabulary_fingerprint_follows_what_ids_mean() -> None:
    same = vocabulary_fingerprint({"b": 1, "a": 0})

    assert vocabulary_fingerprint({"a": 0, "b": 1}) == same
    assert vocabulary_fingerprint({"a": 1, "b": 0}) != same
    assert vocabulary_fingerprint({"a": 0, "b": 1, "c": 2}) != same


def test_the_padded_size_of_a_model_is_no_part_of_its_vocabulary() -> None:
    # Qwen2.5: one tokenizer, embeddings of 151,936 and 152,064 rows
    sizes = [model_vocab_size({"vocab_size": 151_936}), model_vocab_size({"vocab_size": 152_064})]
    vocabularies = [{f"t{i}": i for i in range(100)} for _ in sizes]

    assert sizes[0] != sizes[1]
    assert vocabulary_difference(*vocabularies) is None
    assert vocabulary_fingerprint(vocabularies[0]) == vocabulary_fingerprint(vocabularies[1])


def test_the_vocabulary_size_of_a_multimodal_model_is_its_text_model_s() -> None:
    assert model_vocab_size({"text_config": {"vocab_size": 9}}) == 9
