"""What is computed once: the cache of tensors, the pool of compositions, the latents of pictures from disk."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from training_runs import TINY_VAE, side_by_side

from ldm.checkpoints.files import read_tensors
from ldm.data.buckets import cut
from ldm.data.pictures import PictureSet, open_pictures
from ldm.emoji.mixture import Mixture, MixtureConfig
from ldm.emoji.pools import MixturePool
from ldm.emoji.sprites import SpriteSet, load_sprites
from ldm.errors import UserError
from ldm.files import try_lock
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.pictures import to_tensor
from ldm.training.data.cache import Entry, TensorCache
from ldm.training.data.latents import PictureLatents

# Tensors by key


def value(key: str) -> Entry:
    """An entry that its key decides; odd ones are of another shape."""
    number = int(key)
    return {"latents": torch.full((2, 3 + number % 2), number / 7), "mask": torch.tensor([number, number])}


def maker(asked: list[list[str]]) -> Callable[[Sequence[str]], list[Entry]]:
    def make(keys: Sequence[str]) -> list[Entry]:
        asked.append(list(keys))
        return [value(key) for key in keys]

    return make


def test_a_cache_gives_back_what_was_put_in_as_float16(tmp_path: Path) -> None:
    asked: list[list[str]] = []
    cache = TensorCache(tmp_path / "cache")
    cache.fill(["0", "1", "2", "1", "3", "4"], maker(asked), chunk=2, shard=3, note=lambda key: f"<{key}>")
    assert asked == [["0", "1"], ["2"], ["3", "4"]]
    for each in (cache, TensorCache(tmp_path / "cache")):
        assert each.keys() == set("01234") and "4" in each and "5" not in each
        for key in "01234":
            entry = each.read(key)
            assert entry.keys() == {"latents", "mask"} and entry["latents"].dtype == torch.float16
            assert torch.equal(entry["latents"], value(key)["latents"].half())
            assert torch.equal(entry["mask"], value(key)["mask"])
            assert each.note(key) == f"<{key}>"
    cache.fill(["4", "5"], maker(asked))
    assert asked[3:] == [["5"]] and cache.note("5") == ""
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_an_interrupted_build_loses_a_shard_at_most(tmp_path: Path) -> None:
    def dying(keys: Sequence[str]) -> list[Entry]:
        if "7" in keys:
            raise KeyboardInterrupt
        return [value(key) for key in keys]

    keys, asked = [str(i) for i in range(10)], list[list[str]]()
    with pytest.raises(KeyboardInterrupt):
        TensorCache(tmp_path).fill(keys, dying, chunk=1, shard=3)
    again = TensorCache(tmp_path)
    assert len(again.keys()) == 6
    again.fill(keys, maker(asked), chunk=9)
    assert asked == [["6", "7", "8", "9"]]
    assert all(torch.equal(again.read(key)["mask"], value(key)["mask"]) for key in keys)


def test_a_build_writes_what_it_has_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock, here a second an entry, and whole shards all the same."""
    now = [0.0]
    monkeypatch.setattr("ldm.training.data.cache.time.monotonic", lambda: now[0])

    def slow(keys: Sequence[str]) -> list[Entry]:
        now[0] += len(keys)
        if "8" in keys:
            raise KeyboardInterrupt
        return [value(key) for key in keys]

    with pytest.raises(KeyboardInterrupt):
        TensorCache(tmp_path, every=2.5).fill([str(i) for i in range(10)], slow, chunk=1, note=str)
    again = TensorCache(tmp_path)
    assert again.keys() == set("012345") and len(list(tmp_path.iterdir())) == 2
    assert all(again.note(key) == key for key in again.keys())  # noqa: SIM118 (not a mapping)


def test_what_a_killed_build_left_is_swept_unless_it_may_be_going_on(tmp_path: Path) -> None:
    old, new = (tmp_path / f".shard-{name}.safetensors.0123abcd.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    lock = try_lock(new)  # as its writer holds it
    assert lock is not None
    TensorCache(tmp_path).fill(["1"], maker([]))
    os.close(lock)
    assert not old.exists() and new.exists()


def test_what_a_cache_cannot_hold_or_read_is_refused(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    for bad in (float("nan"), 1e6):  # the second is infinite in float16
        with pytest.raises(UserError, match=r"the entry a for .*NaN or infinity in 1 of 1 tensors"):
            cache.fill(["a"], lambda keys, bad=bad: [{"x": torch.tensor(bad)}])
    with pytest.raises(ValueError, match="0 entries were made for 1 keys"):
        cache.fill(["a"], lambda keys: [])
    assert "a" not in cache and not list(tmp_path.iterdir())
    cache.fill(["a"], lambda keys: [{"x": torch.zeros(9)}])
    shard = next(tmp_path.iterdir())
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"shard-.*delete it, it is built anew"):
        TensorCache(tmp_path)


def test_a_shard_that_others_cut_short_or_damage_while_it_is_in_use_is_an_error(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.fill(["a", "b"], lambda keys: [{"x": torch.full((9, 3), float(ord(key)))} for key in keys])
    assert cache.read("b")["x"].tolist() == [[98.0] * 3] * 9
    shard = next(tmp_path.iterdir())
    whole = shard.read_bytes()
    os.truncate(shard, len(whole) - 4)
    assert cache.read("a")["x"].tolist() == [[97.0] * 3] * 9
    with pytest.raises(UserError, match=r"shard-.* can't be read: it was cut short while it was in use"):
        cache.read("b")
    shard.write_bytes(whole.replace(b'\\"0/\\", 1,', b'\\"0/\\", 7,'))
    with pytest.raises(UserError, match=r"shard-.* has 2 rows of '0/x' and none of number 7"):
        TensorCache(tmp_path).read("b")
    shard.write_bytes(whole.replace(b'\\"0/\\", 1,', b'\\"5/\\", 1,'))
    with pytest.raises(UserError, match=r"shard-.* lacks the tensors of '5/': delete it"):
        TensorCache(tmp_path).read("b")
    save_file({"0/x": torch.tensor(3.0)}, shard, {"rows": '[["b", "0/", 0, ""]]'})
    with pytest.raises(UserError, match=r"shard-.* can't be read: '0/x' has no rows"):
        TensorCache(tmp_path).read("b")


def test_one_of_two_processes_fills(tmp_path: Path) -> None:
    said = side_by_side(
        f"""
        import torch
        from ldm.training.data.cache import TensorCache
        from ldm.training.distributed import processes
        def make(keys):
            print("made", *keys)
            return [{{"x": torch.tensor(float(key))}} for key in keys]
        cache = TensorCache({str(tmp_path)!r})
        cache.fill(["1", "2", "3"], make, chunk=2, shard=2)
        assert [cache.read(key)["x"].item() for key in "123"] == [1, 2, 3]
        assert processes().num_processes == 2
        """
    )
    assert said == ["made 1 2\nmade 3\n", ""]


# The pool


def tiny_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(AutoencoderConfig.from_diffusers(TINY_VAE)).eval()


def test_a_pool_knows_what_it_was_made_from(
    tmp_path: Path, sprites: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made otherwise has other keys: it is built beside, and what was there stays."""
    monkeypatch.setattr("ldm.emoji.pools.SHARD", 8)
    autoencoder = tiny_autoencoder()
    mixture = MixtureConfig(size=32, things=["tree", "star", "rocket"], styles=["3d"])
    names = load_sprites(sprites)

    def pool(mixture: MixtureConfig = mixture, sprites: SpriteSet = names, **options: Any) -> MixturePool:
        return MixturePool(Mixture(sprites, mixture), autoencoder, 16, tmp_path / "latents", **options)

    def shards() -> int:
        return len(list((tmp_path / "latents").iterdir()))

    batch = pool().read(0, 8)
    assert shards() == 1  # as needed
    batch = pool(with_pictures=True).read(0, 16)
    assert batch.latents.shape == (16, 4, 16, 16) and batch.latents.dtype == torch.float32 and shards() == 2
    examples = [Mixture(names, mixture).sample(i) for i in range(16)]
    assert batch.captions == [example.caption for example in examples] and not pool().notes()
    assert batch.pictures is not None
    assert torch.equal(batch.pictures, to_tensor([example.picture for example in examples]))
    assert torch.equal(batch.time_ids, torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 16))
    again = pool().read(0, 16, slice(8, 16))
    assert torch.equal(again.latents, batch.latents[8:]) and again.pictures is None
    later = pool().read(16, 16)  # another order
    assert not torch.equal(later.latents, batch.latents)
    assert sorted(later.captions) == sorted(batch.captions)
    with torch.no_grad():
        autoencoder.decoder.conv_in.weight.zero_()
    assert (
        torch.equal(pool().read(0, 16).latents, batch.latents) and shards() == 2
    )  # a decoder makes no latents
    other = {key: each // 2 for key, each in names.pixels.items()}
    pool(replace(mixture, jitter=0.2)).read(0, 8)
    pool(sprites=SpriteSet(other, 128)).read(0, 8)
    pool(dtype=torch.float32).read(0, 8)
    assert shards() == 5
    with torch.no_grad():
        autoencoder.encoder.conv_in.weight.zero_()
    assert not torch.equal(pool().read(0, 8).latents, batch.latents[:8]) and shards() == 6
    for pictures in (0, 12):
        with pytest.raises(UserError, match="make it a multiple of 8"):
            MixturePool(Mixture(names, mixture), autoencoder, pictures, tmp_path)


# Pictures from disk

SIZES = [(20, 20)] * 5 + [(16, 40)] * 4 + [(50, 30)] * 5


@pytest.fixture
def from_disk(tmp_path: Path) -> PictureSet:
    (tmp_path / "data").mkdir()
    for i, size in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i:02d}.png")
        (tmp_path / "data" / f"{i:02d}.txt").write_text(str(i))
    (tmp_path / "data" / "broken.png").write_text("no picture")
    return open_pictures(tmp_path / "data")


def latents_of(pictures: PictureSet, autoencoder: AutoencoderKL, **options: Any) -> PictureLatents:
    settings = {"resolution": 16, "max_ratio": 2.0, "step": 2, "dtype": torch.float32}
    return PictureLatents(pictures, autoencoder, **{**settings, **options})


@torch.no_grad()
def test_latents_are_those_of_the_cut_pictures(from_disk: PictureSet, tmp_path: Path) -> None:
    """With a cache and without, mirrored or not; a batch is of one size, and its conditions tell its cuts."""
    autoencoder = tiny_autoencoder()
    plain = latents_of(from_disk, autoencoder, flip=True, with_pictures=True)
    cached = latents_of(from_disk, autoencoder, flip=True, cache=tmp_path / "cache")
    cached.prepare(4)
    plain.prepare(4)
    assert cached.cache is not None and len(cached.cache.keys()) == 2 * len(SIZES)
    assert len(set(plain.targets)) == 3 and len(plain.notes()) == 2 and "broken.png" in plain.notes()[0]
    mirrored: set[bool] = set()
    for start in range(0, 64, 4):
        batch, stored = plain.read(start, 4), cached.read(start, 4)
        assert stored.pictures is None and stored.captions == batch.captions and batch.pictures is not None
        assert torch.equal(stored.time_ids, batch.time_ids)
        torch.testing.assert_close(stored.latents, batch.latents, rtol=2e-3, atol=1e-3)  # float16
        framed = plain._framed(start, 4, slice(None))
        whole = [cut(from_disk.read(index), framing) for index, framing in framed]
        assert torch.equal(batch.pictures, to_tensor(whole))
        expected = autoencoder.scale(autoencoder.encode(to_tensor(whole)).mean)
        torch.testing.assert_close(batch.latents, expected, rtol=1e-4, atol=1e-5)
        assert batch.time_ids.tolist() == [list(framing.time_ids) for _, framing in framed]
        assert batch.time_ids[:, :2].tolist() == [list(SIZES[int(caption)]) for caption in batch.captions]
        assert tuple(batch.time_ids[0, 4:].long().tolist()) == batch.pictures.shape[2:]
        mirrored |= {framing.flipped for _, framing in framed}
    assert mirrored == {False, True}


def test_latents_are_a_function_of_the_position(from_disk: PictureSet) -> None:
    """Also with what is decoded ahead; two processes' rows are those of the whole batch."""
    options: dict[str, Any] = {"crop": "random", "flip": True, "seed": 5}
    autoencoder = tiny_autoencoder()
    whole = latents_of(from_disk, autoencoder, **options)
    batches = [whole.read(start, 4) for start in range(0, 32, 4)]
    parts = [latents_of(from_disk, autoencoder, **options) for _ in range(2)]
    for start in (16, 20, 4, 8):
        rows = [part.read(start, 4, slice(2 * i, 2 * i + 2)) for i, part in enumerate(parts)]
        for name in ("latents", "time_ids"):
            joined = torch.cat([getattr(part, name) for part in rows])
            torch.testing.assert_close(joined, getattr(batches[start // 4], name), rtol=1e-4, atol=1e-5)
        assert [*rows[0].captions, *rows[1].captions] == batches[start // 4].captions
    lefts: set[float] = set()
    lefts.update(*(batch.time_ids[:, 3].tolist() for batch in batches))
    assert len(lefts) > 2
    other = latents_of(from_disk, autoencoder, **{**options, "seed": 6})
    assert [other.read(start, 4).captions for start in range(0, 32, 4)] != [
        batch.captions for batch in batches
    ]


def test_no_picture_is_decoded_twice_for_a_batch(
    from_disk: PictureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where a batch is read in parts, for gradient accumulation, nor for having been decoded ahead."""
    made: list[Any] = []
    monkeypatch.setattr("ldm.training.data.latents.cut", lambda *args: made.append(args) or cut(*args))
    source = latents_of(from_disk, tiny_autoencoder(), crop="random", seed=3)
    for start in range(0, 16, 4):
        for rows in (slice(0, 2), slice(2, 4)):
            source.read(start, 4, rows)
    source._workers.shutdown()
    foreseen = [place for start in range(0, 20, 4) for place in set(source._framed(start, 4, slice(None)))]
    assert len(made) == len(foreseen)


def test_a_cache_is_filled_anew_for_what_changed_only(
    from_disk: PictureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder, encoded = tiny_autoencoder(), list[int]()
    plain = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x: encoded.append(len(x)) or plain(self, x))

    def read(pictures: PictureSet = from_disk, **options: Any) -> Tensor:
        del encoded[:]
        return latents_of(pictures, autoencoder, cache=tmp_path / "cache", **options).read(0, 4).latents

    first = read()
    assert sum(encoded) == len(SIZES)
    assert torch.equal(read(), first) and not encoded
    Image.new("RGB", (20, 20)).save(tmp_path / "data" / "00.png")
    (tmp_path / "data" / "01.png").rename(tmp_path / "data" / "elsewhere.png")
    now = open_pictures(tmp_path / "data")
    read(now)
    assert sum(encoded) == 1  # a picture is known by its bytes, not by its name
    for changes in ({"flip": True}, {"resolution": 8}, {"dtype": torch.bfloat16}):
        read(now, **changes)
        assert sum(encoded) == len(SIZES), changes
    with torch.no_grad():
        autoencoder.decoder.conv_in.weight.zero_()
    read(now)
    assert not encoded
    with torch.no_grad():
        autoencoder.encoder.conv_in.weight.zero_()
    read(now)
    assert sum(encoded) == len(SIZES)
    stored = [read_tensors(path) for path in (tmp_path / "cache").iterdir()]
    assert all(each.dtype == torch.float16 for shard in stored for each in shard.values())


def test_an_interrupted_build_of_a_small_set_is_gone_on_from(
    from_disk: PictureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far below a shard's size, and of several buckets."""
    autoencoder, encoded = tiny_autoencoder(), list[int]()
    plain = AutoencoderKL.encode

    def encode(self: AutoencoderKL, x: Tensor) -> Any:
        if len(encoded) == fails_after:
            raise KeyboardInterrupt
        encoded.append(len(x))
        return plain(self, x)

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    for fails_after in (3, -1):
        source = latents_of(from_disk, autoencoder, cache=tmp_path / "cache")
        assert source.cache is not None
        source._chunk, source.cache.every = 2, 0.0
        with pytest.raises(KeyboardInterrupt) if fails_after > 0 else nullcontext():
            source.prepare(4)
    assert sum(encoded) == len(SIZES)
    torch.testing.assert_close(
        source.read(0, 4).latents, latents_of(from_disk, autoencoder).read(0, 4).latents, rtol=2e-3, atol=1e-3
    )


def test_latents_that_cannot_be_are_refused(from_disk: PictureSet, tmp_path: Path) -> None:
    for options, complaint in (
        ({"crop": "random", "cache": tmp_path}, "can't be cached: set crop to center, or no cache"),
        ({"step": 3}, "make it a multiple of 2, the autoencoder's factor"),
        ({"resolution": 17}, "resolution is 17: make it a multiple of 2"),
    ):
        with pytest.raises(UserError, match=complaint):
            latents_of(from_disk, tiny_autoencoder(), **options)
