"""Tokenizers: the published ids, the conventions, the search order and its errors."""

import json
import shutil

import golden
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from anima_fast.errors import UserError
from anima_fast.models import tokenizer_files
from anima_fast.models.spiece import read_spiece
from anima_fast.models.tokenizers import load_tokenizers

TEXT = ["1girl, solo, long hair, blue eyes", "a cat on a red mat, smile", "castle at night"] * 3


def train_qwen(folder, text=TEXT, special=("<|endoftext|>",)):
    """A small byte-level BPE as tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def train_t5(folder, special=("<pad>", "</s>", "<unk>")):
    """A small unigram tokenizer as tokenizer.json, with truncation and padding left on."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=list(special), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return train_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return train_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def small(qwen, t5):
    return load_tokenizers(qwen, t5_tokenizer_path=t5)


@pytest.fixture(scope="module")
def published():
    folder = golden.tokenizers()
    return load_tokenizers(folder / "qwen3_06b", t5_tokenizer_path=folder / "t5_old")


def test_published_ids(published):
    expected = golden.load_json("tokens")
    rows = expected["rows"]
    assert len(rows) == 40
    batch = published.encode([row["prompt"] for row in rows])
    for i, row in enumerate(rows):
        for ids, mask, name, pad in (
            (batch.qwen_ids, batch.qwen_mask, "qwen3", expected["qwen3_pad_id"]),
            (batch.t5_ids, batch.t5_mask, "t5", expected["t5_pad_id"]),
        ):
            length = row[f"{name}_len"]
            assert ids[i, :length].tolist() == row[f"{name}_ids"], row["prompt"][:60]
            assert (ids[i, length:] == pad).all()
            assert mask[i].tolist() == [1] * length + [0] * (ids.shape[1] - length)


def test_special_tokens_in_captions(published):
    batch = published.encode(["a <|im_end|> b", "</s> <extra_id_0>"])
    assert 151645 in batch.qwen_ids[0]
    assert batch.t5_ids[1].tolist()[:4].count(1) == 2 and 32099 in batch.t5_ids[1]


def test_spiece_equals_json():
    folder = golden.tokenizers() / "t5_old"
    ours = read_spiece(folder / "spiece.model")
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [row["prompt"] for row in golden.load_json("tokens")["rows"]]
    prompts += ["  two   spaces ", "\tTab\nline", "ﬁ ｆｕｌｌ １", "▁x", "a</s>b", "<extra_id_99>"]
    for prompt in prompts:
        expected = theirs.encode(prompt, add_special_tokens=False).ids
        assert ours.encode(prompt, add_special_tokens=False).ids == expected, prompt[:40]


def test_empty_caption(small):
    batch = small.encode(["", "a cat"])
    assert batch.qwen_mask[0].sum() == 0 and (batch.qwen_ids[0] == small.qwen_pad).all()
    assert batch.t5_ids[0, 0] == small.t5_end and batch.t5_mask[0].tolist()[0] == 1
    assert batch.t5_mask[0].sum() == 1 and (batch.t5_ids[0, 1:] == 0).all()
    alone = small.encode([""])
    assert alone.qwen_ids.shape == alone.qwen_mask.shape == (1, 1)
    assert alone.t5_ids.tolist() == [[small.t5_end]]
    assert all(t.dtype == torch.int64 for t in vars(batch).values())


def test_truncation_keeps_the_end_token(small):
    caption = "a cat on a red mat"
    full = small.encode([caption])
    cut = small.encode([caption], qwen3_max=3, t5_max=3)
    assert cut.qwen_ids.tolist() == full.qwen_ids[:, :3].tolist()
    assert cut.t5_ids.tolist() == [[*full.t5_ids[0, :2].tolist(), small.t5_end]]
    assert full.t5_ids.shape[1] > 3 and full.t5_ids[0, -1] == small.t5_end
    assert small.qwen_lengths([caption, ""]) == [full.qwen_ids.shape[1], 0]
    assert small.t5_lengths([caption, ""]) == [full.t5_ids.shape[1], 1]
    with pytest.raises(ValueError, match="at least 1"):
        small.encode([caption], t5_max=0)


def test_batch_pads_to_the_longest(small):
    captions = ["a cat on a red mat", "cat"]
    batch = small.encode(captions)
    for i, caption in enumerate(captions):
        one = small.encode([caption])
        length = one.qwen_ids.shape[1]
        assert batch.qwen_ids[i, :length].tolist() == one.qwen_ids[0].tolist()
        assert batch.qwen_mask[i].sum() == length
    assert batch.qwen_mask[0].all() and not batch.qwen_mask[1].all()


def test_pad_ids(tmp_path, small, t5):
    assert small.qwen_pad == small.qwen.token_to_id("<|endoftext|>")
    without = load_tokenizers(train_qwen(tmp_path / "q", special=()), t5_tokenizer_path=t5)
    assert without.qwen_pad == 0
    endless = train_t5(tmp_path / "t", special=("<pad>", "<unk>"))
    with pytest.raises(UserError, match="no </s>"):
        load_tokenizers(tmp_path / "q", t5_tokenizer_path=endless)


def test_vocabulary_files_equal_json(tmp_path, qwen, t5, small):
    """vocab.json + merges.txt + tokenizer_config.json, as published, with flags and fixed ids."""
    data = json.loads((qwen / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocab = {k: v - 1 for k, v in data["vocab"].items() if k != "<|endoftext|>"}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    added = {str(len(vocab)): {"content": "<|endoftext|>", "special": True}}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    built = load_tokenizers(tmp_path, t5_tokenizer_path=t5)
    caption = "1girl, blue cat's <|endoftext|>"
    ids = built.encode([caption]).qwen_ids[0].tolist()
    assert ids[-1] == len(vocab) == built.qwen_pad
    assert [i + 1 for i in ids[:-1]] == small.encode([caption]).qwen_ids[0].tolist()[:-1]
    added = {str(len(vocab) + 7): {"content": "<|endoftext|>", "special": True}}
    config.write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    with pytest.raises(UserError, match="does not get its id"):
        load_tokenizers(tmp_path, t5_tokenizer_path=t5)


def test_identity_follows_the_files(tmp_path, qwen, t5, small):
    copy = shutil.copytree(qwen, tmp_path / "copy")
    assert load_tokenizers(copy, t5_tokenizer_path=t5).identity == small.identity
    other = train_qwen(tmp_path / "other", text=["quite different words"])
    assert load_tokenizers(other, t5_tokenizer_path=t5).identity != small.identity


def marked(folder, number):
    """A Qwen tokenizer that is told from others by its vocabulary."""
    return train_qwen(folder, special=tuple(f"<{i}>" for i in range(number)))


def test_search_order(tmp_path, t5, monkeypatch):
    """Qwen3 directory, option, beside the file, models folder, hub cache: the first that has it."""
    import huggingface_hub

    model = tmp_path / "model"
    places = [
        (model, {}),
        (tmp_path / "option", {}),
        (tmp_path / "qwen3_tokenizer", {}),
        (tmp_path / "models" / "qwen3_tokenizer", {}),
        (tmp_path / "hub", {}),
    ]
    for number, (folder, _) in enumerate(places, start=1):
        marked(folder, number)
    cached = {("Qwen/Qwen3-0.6B-Base", "tokenizer.json"): str(tmp_path / "hub" / "tokenizer.json")}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, name: cached.get((repo, name))
    )

    def found(**options):
        options |= {"t5_tokenizer_path": t5, "models_dir": tmp_path / "models"}
        both = load_tokenizers(model, **options)
        return next(n for n in range(9) if both.qwen.token_to_id(f"<{n}>") is None)

    option = {"qwen3_tokenizer_path": tmp_path / "option"}
    assert found(**option) == 1
    (model / "tokenizer.json").unlink()
    assert found(**option) == 2
    assert found() == 3
    (tmp_path / "qwen3_tokenizer" / "tokenizer.json").unlink()
    assert found() == 4
    (tmp_path / "models" / "qwen3_tokenizer" / "tokenizer.json").unlink()
    assert found() == 5


def test_t5_places(tmp_path, qwen, t5, monkeypatch):
    model = shutil.copytree(qwen, tmp_path / "model")
    home = tmp_path / "home"
    monkeypatch.setenv("ANIMA_FAST_HOME", str(home))
    for folder in (model, tmp_path, home / "models"):
        place = shutil.copytree(t5, folder / "t5_tokenizer")
        assert load_tokenizers(model).t5_end == 1
        shutil.rmtree(place)
    with pytest.raises(UserError, match="no T5 tokenizer"):
        load_tokenizers(model)


def test_nothing_found_says_what_to_do(tmp_path, t5):
    with pytest.raises(UserError) as error:
        load_tokenizers(tmp_path / "qwen.safetensors", t5_tokenizer_path=t5, models_dir=tmp_path)
    message = str(error.value)
    for word in ("anima-fast download", "Qwen/Qwen3-0.6B-Base", "--qwen3_tokenizer_path",
                 str(tmp_path / "qwen3_tokenizer"), "vocab.json"):  # fmt: skip
        assert word in message
    assert "\n" not in message


def test_downloads_only_the_small_files(tmp_path, t5, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub, asked = marked(tmp_path / "hub", 2), []

    def fetch(repo, name):
        asked.append((repo, name))
        return str(hub / name)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tokenizer_files, "_reachable", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    model = tmp_path / "somewhere" / "qwen.safetensors"
    assert load_tokenizers(model, t5_tokenizer_path=t5).qwen.token_to_id("<1>") == 1
    assert asked == [("Qwen/Qwen3-0.6B-Base", "tokenizer.json")]

    def fail(repo, name):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match="no network"):
        load_tokenizers(model, t5_tokenizer_path=t5)
    monkeypatch.setattr(tokenizer_files, "_reachable", lambda endpoint: False)
    with pytest.raises(UserError, match="cannot be reached"):
        load_tokenizers(model, t5_tokenizer_path=t5)


def test_wrong_explicit_path_does_not_fall_through(tmp_path, qwen, t5):
    shutil.copytree(t5, tmp_path / "models" / "t5_tokenizer")
    for wrong in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="--t5_tokenizer_path needs"):
            load_tokenizers(qwen, t5_tokenizer_path=wrong, models_dir=tmp_path / "models")
        with pytest.raises(UserError, match="--qwen3_tokenizer_path needs"):
            load_tokenizers(qwen, qwen3_tokenizer_path=wrong, t5_tokenizer_path=t5)
    file = load_tokenizers(qwen, t5_tokenizer_path=t5 / "tokenizer.json")
    assert file.t5_end == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}'])
def test_damaged_json(tmp_path, qwen, t5, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        load_tokenizers(tmp_path, t5_tokenizer_path=t5)
    with pytest.raises(UserError, match="not a readable tokenizer"):
        load_tokenizers(qwen, t5_tokenizer_path=tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x0a", b"\xff" * 30, b"\x0a\x05\x0a\x03abc"])
def test_damaged_spiece(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match="not a sentencepiece model"):
        read_spiece(tmp_path / "spiece.model")


def test_damaged_vocabulary(tmp_path, t5):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        load_tokenizers(tmp_path, t5_tokenizer_path=t5)
