"""Makes a Triton model repository out of releases: version folders that appear whole, the newest served.

    <repository>/<name>/config.pbtxt
    <repository>/<name>/<version>/    model.onnx, labels.txt (line n: class of column n) and the release's other files

The number of classes grows from version to version, which one configuration cannot describe: config.pbtxt leaves the
shapes to be completed from the model, and has one version served: the latest, or one that is pinned.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from exporter.files import link_or_copy, sync
from exporter.release import MANIFEST, MODEL, Release

_CONFIG = """\
name: "{name}"
backend: "onnxruntime"
max_batch_size: {max_batch}
version_policy: {{ {policy} }}
dynamic_batching: {{ }}
"""
"""Triton's configuration of the model. Inputs and outputs are left out: Triton reads them from the ONNX file, so that
versions with other numbers of classes can stand beside each other."""


def publish(
    release: Release,
    repository: Path,
    name: str,
    version: int,
    *,
    keep: int = 3,
    max_batch: int = 64,
    pinned: int | None = None,
) -> Path:
    """Put `release` into the repository as `version` (>= 1, larger than those before it) and delete all but the newest
    `keep` (>= 1); returns the version's folder. A version that is there already is left as it is.

    The newest version is served, or `pinned`, which must be `version` or there already and is not deleted.

    Triton's polling mode may read half of what is copied in place; here a version comes by one rename. Raises
    ValueError for numbers out of range, and OSError.
    """
    if version < 1 or keep < 1:
        raise ValueError(f"got version {version} and keep {keep}, expected both to be 1 or more")
    model = repository / name
    model.mkdir(parents=True, exist_ok=True)
    for left in (*model.glob(".staging-*"), *model.glob(".old-*")):  # left behind by a process that died
        shutil.rmtree(left)
    folder = model / str(version)
    config = model / "config.pbtxt"
    policy = f"specific: {{ versions: [{pinned}] }}" if pinned else "latest: { num_versions: 1 }"
    text = _CONFIG.format(name=name, max_batch=max_batch, policy=policy)
    if not config.exists():  # before the first version: Triton would serve it with a configuration of its own making
        _replace(config, text)
    if not folder.exists():
        staging = model / f".staging-{version}"
        _stage(release, staging)
        staging.rename(folder)
        sync(model)
    # After the version, so that the policy never names one that is not there.
    if config.read_text(encoding="utf-8") != text:
        _replace(config, text)
    for old in set(versions(repository, name)[:-keep]) - {pinned}:
        # Renamed first, since deleting takes time, in which Triton could read half of a version.
        gone = model / f".old-{old}"
        (model / str(old)).rename(gone)
        shutil.rmtree(gone)
    return folder


def versions(repository: Path, name: str) -> list[int]:
    """List the numbers of the model's versions, ascending. Raises FileNotFoundError when the repository has no such
    model.
    """
    return sorted(int(path.name) for path in (repository / name).iterdir() if path.name.isdecimal())


def _stage(release: Release, staging: Path) -> None:
    """Fill the new folder `staging` with what a version has, synced."""
    staging.mkdir()
    parts = [name for name in release.files if name in (MODEL, f"{MODEL}.data")]
    target = staging
    if len(parts) > 1:  # Triton wants a model of several files in a folder named like the file
        target = staging / MODEL
        target.mkdir()
    for name in release.files:
        # Triton reads the model in fp32; the other precisions would only take room.
        if not name.startswith("model.") or name in parts:
            link_or_copy(release.path / name, (target if name in parts else staging) / name)
    link_or_copy(release.path / MANIFEST, staging / MANIFEST)
    _write(staging / "labels.txt", "".join(f"{label}\n" for label in release.classes))
    for folder in {target, staging}:
        sync(folder)


def _write(path: Path, text: str) -> None:
    """Write a small file and force it to the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def _replace(path: Path, text: str) -> None:
    """Replace a small file by one rename, which survives a power cut."""
    new = path.with_name(".config.new")
    _write(new, text)
    new.rename(path)
    sync(path.parent)
