"""Compiled kernels of the Hugging Face hub, which the package `kernels` downloads: names, trust, cache.

A kernel is code that runs on the user's machine. `kernels-community`, Hugging Face's own publisher, is trusted, as
transformers does; others only with `model.trust_remote_code: true`. Only what the recipe names is downloaded.
"""

from typing import NamedTuple

from huggingface_hub import constants
from transformers.integrations.hub_kernels import get_attn_kernel_version
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available

from train.errors import MachineError
from train.recipe import ModelSection
from train.storage.local_paths import hub_offline_reason

TRUSTED_PUBLISHER = "kernels-community"
PACKAGE = f"kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}"
"""Versions of the package that the installed transformers accepts."""
INSTALL_PACKAGE = f"Install it with `pip install '{PACKAGE}'`"


class HubKernel(NamedTuple):
    """A kernel's repository, and either a revision or the major version of its interface."""

    repo_id: str
    revision: str | None
    version: int | None

    @property
    def download_command(self) -> str:
        """Command that downloads the build for the installed torch and CUDA, which a machine without a GPU can run."""
        pinned = f"revision={self.revision!r}" if self.revision else f"version={self.version}"
        return f'python -c "from kernels import install_kernel; install_kernel({self.repo_id!r}, {pinned})"'


def parse_hub_kernel(name: str) -> HubKernel:
    """Return the kernel of a name `publisher/repository[@revision][:function]`, as transformers reads it."""
    repo_id, _, revision = name.partition(":")[0].partition("@")
    return HubKernel(repo_id, revision or None, None if revision else get_attn_kernel_version(repo_id))


def is_trusted(name: str) -> bool:
    """Return whether a kernel is of the publisher whose code transformers runs without being asked."""
    return name.partition("/")[0] == TRUSTED_PUBLISHER


def package_is_missing() -> bool:
    """Return whether the package `kernels` is not installed, or in a version that transformers doesn't accept."""
    return not is_kernels_available()


def check_layer_kernels(model: ModelSection) -> None:
    """Raise MachineError if `model.use_kernels` is set without the package. The layers are replaced in training."""
    if model.use_kernels and package_is_missing():
        reason = f"model.use_kernels: it needs the package {PACKAGE}, which is not installed"
        raise MachineError(reason, f"{INSTALL_PACKAGE}, or write false.")


def is_cached(kernel: HubKernel) -> bool:
    """Return whether a build for this machine's torch and accelerator is in the hub's cache. Runs none of its code."""
    if package_is_missing():
        return False
    from kernels import install_kernel

    try:  # trust is not asked for: nothing is loaded
        install_kernel(
            kernel.repo_id,
            revision=kernel.revision,
            version=kernel.version,
            local_files_only=True,
            trust_remote_code=True,
        )
    except (OSError, ValueError, RuntimeError):
        return False
    return True


def unavailable_reason(kernel: HubKernel) -> str | None:
    """Return why a kernel can't be loaded, as a continuation of its name; None if it can, or may be downloaded."""
    if package_is_missing():
        return f"needs the package {PACKAGE}, which is not installed"
    if not (offline := hub_offline_reason()):
        return None
    if not is_cached(kernel):
        return f"is not in the cache of the hub with a build for this torch, and the hub is unreachable: {offline}"
    if not constants.HF_HUB_OFFLINE:  # else `kernels` looks for the publisher and for newer builds first
        return f"is in the cache of the hub, but the package kernels asks the hub before it loads it: {offline}"
    return None


def remedy(kernel: HubKernel) -> str:
    """Return what to do about `unavailable_reason`, without a full stop."""
    if package_is_missing():
        return INSTALL_PACKAGE
    if is_cached(kernel):
        return "Set HF_HUB_OFFLINE=1 in the environment"
    return f"Download it where the hub can be reached, with the same torch: `{kernel.download_command}`"
