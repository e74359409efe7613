"""A Triton model repository out of releases: version folders that appear whole, the newest served.

    <repository>/<name>/config.pbtxt
    <repository>/<name>/<version>/    model.onnx, labels.txt (line n: class of column n), release.json, golden.npz

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
    `keep`; returns the version's folder. Publishing a version again that is there changes nothing.

    The newest version is served, or `pinned`, which must be `version` or there already and is not deleted.

    Triton's polling mode may read half of what is copied in place; here a version comes by one rename.
    """
    if version < 1 or keep < 1:
        raise ValueError(f"got version {version} and keep {keep}, expected both to be 1 or more")
    model = repository / name
    model.mkdir(parents=True, exist_ok=True)
    for left in (*model.glob(".staging-*"), *model.glob(".old-*")):  # by a process that died
        shutil.rmtree(left)
    folder = model / str(version)
    config = model / "config.pbtxt"
    policy = f"specific: {{ versions: [{pinned}] }}" if pinned else "latest: { num_versions: 1 }"
    text = _CONFIG.format(name=name, max_batch=max_batch, policy=policy)
    if not config.exists():
        _replace(config, text)
    if not folder.exists():
        staging = model / f".staging-{version}"
        _stage(release, staging)
        staging.rename(folder)
        sync(model)
    if config.read_text(encoding="utf-8") != text:
        _replace(config, text)
    for old in set(versions(repository, name)[:-keep]) - {pinned}:
        gone = model / f".old-{old}"
        (model / str(old)).rename(gone)
        shutil.rmtree(gone)
    return folder


def versions(repository: Path, name: str) -> list[int]:
    """Numbers of the versions in the repository, ascending."""
    return sorted(int(path.name) for path in (repository / name).iterdir() if path.name.isdecimal())


def _stage(release: Release, staging: Path) -> None:
    staging.mkdir()
    parts = [name for name in release.files if name in (MODEL, f"{MODEL}.data")]
    target = staging
    if len(parts) > 1:  # a model of several files is a folder named like the file
        target = staging / MODEL
        target.mkdir()
    for name in release.files:
        if not name.startswith("model.") or name in parts:
            link_or_copy(release.path / name, (target if name in parts else staging) / name)
    link_or_copy(release.path / MANIFEST, staging / MANIFEST)
    _write(staging / "labels.txt", "".join(f"{label}\n" for label in release.classes))
    for folder in {target, staging}:
        sync(folder)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(".config.new")
    _write(new, text)
    new.rename(path)
    sync(path.parent)
