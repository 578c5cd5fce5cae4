"""What must be settled before JAX starts: CPU compiler flags, kept away from TPU and GPU."""

import importlib.metadata
import os
import sys
from pathlib import Path

# A training step's bf16 products through oneDNN (AMX, AVX512_BF16) instead of a loop: 5 to 10 times
# the tokens a second, measured (docs/log.md). An unknown flag aborts the process, so they are given
# to known versions only.
ONEDNN_FLAGS = (
    "--xla_cpu_experimental_onednn_custom_call=true",
    "--xla_cpu_experimental_ynn_fusion_type=",
)
FORWARD_FLAGS = (
    # Turns sums over rows into windows that the CPU runs 3 to 6 times slower.
    "--xla_disable_hlo_passes=tree_reduction_rewriter",
    "--xla_cpu_prefer_vector_width=512",
)
CPU_FLAGS = (*ONEDNN_FLAGS, *FORWARD_FLAGS)
# glibc gives every large buffer back to the kernel and faults it in again, 1.8 GB a step at 30M
# parameters; kept in one heap of huge pages they cost nothing. Read by glibc at a process' start.
MALLOC = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:"
    "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"
)
KNOWN_JAXLIB = ((0, 11, 2), (0, 13, 0))


def _accelerator_present() -> bool:
    if os.environ.get("JAX_PLATFORMS", "").strip() == "cpu":
        return False
    if any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")):
        return True
    return "TPU_NAME" in os.environ or "TPU_WORKER_ID" in os.environ


def cpu_has_bfloat16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: AMX or AVX512_BF16 (Linux; else False)."""
    if sys.platform != "linux":
        return False
    try:
        flags = Path(cpuinfo).read_text().split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def known_jaxlib() -> bool:
    """Whether the flags above are known to the installed compiler."""
    version = importlib.metadata.version("jaxlib").split(".")[:3]
    numbers = tuple(int(part) for part in version if part.isdigit())
    return KNOWN_JAXLIB[0] <= numbers < KNOWN_JAXLIB[1]


def prepare(*, restart: bool = False, onednn: bool = True) -> None:
    """Sets XLA_FLAGS for a CPU run; call it before JAX is imported, does nothing afterwards.

    A flag that the user has set keeps the user's value. JAXREASON_CPU_FLAGS=0 sets none. With
    `restart`, a command line replaces its process once, with the settings of MALLOC. A command that
    only runs models forward passes `onednn=False`: XLA's own products are then as fast
    (nn.kernels.decode), and its programs can be kept on disk, which those with oneDNN cannot.
    """
    if os.environ.get("JAXREASON_CPU_FLAGS") == "0" or "jax" in sys.modules:
        return
    if _accelerator_present() or not known_jaxlib() or not cpu_has_bfloat16():
        return  # Elsewhere none of this has been measured.
    if restart and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = MALLOC
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    given = os.environ.get("XLA_FLAGS", "")
    flags = CPU_FLAGS if onednn else FORWARD_FLAGS
    added = [flag for flag in flags if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()


def prepare_compile_for() -> None:
    """Sets the environment to compile for hardware that is not here; before JAX is imported.

    JAX itself runs on the CPU. libtpu is kept from asking a cloud's metadata server what machine
    this is, and told what it would ask for, so that it does not complain.
    """
    if "jax" in sys.modules:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # No device is opened, so none is fought over.
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second run starts in seconds."""
    if "onednn_custom_call=true" in os.environ.get("XLA_FLAGS", ""):
        return  # Programs with oneDNN calls cannot be serialised (jaxlib 0.12).
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("JAXREASON_CACHE") or str(Path.home() / ".cache" / "jaxreason")
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
