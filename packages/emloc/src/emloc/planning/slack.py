"""Memory that is held and not given out: a line of its own, and the reasons for its size.

CUDA: torch's caching allocator rounds blocks to 512 bytes, takes segments of 2 MiB for small and of at
least 20 MiB for large ones, and keeps what comes and goes for reuse, where not every block fits again: one
part in twenty of what comes and goes, and one segment. The CUDA context and its kernels are not torch's and
take half a GiB of the card.

CPU: large blocks go back to the system at once (`memory.return_large_blocks`, `memory.streaming_memory`);
the heap of smaller ones fragments, and oneDNN and MKL keep packed operands and buffers per thread: one part
in fifty of what comes and goes, and a constant. Training imports more when it begins, and its measure counts
the pages of those libraries: training the smallest model of each family takes 63 to 72 MB, where a tensor is
nothing.
"""

from emloc.machine.memory_limit import CUDA_CONTEXT

MIB = 1 << 20

CUDA_SHARE, CUDA_SEGMENT = 20, 20 * MIB
CPU_SHARE, CPU_CONSTANT, CPU_TRAINING = 50, 32 * MIB, 64 * MIB


def slack(device: str, moving: int, training: bool = False) -> dict[str, int]:
    """The lines, given the bytes of what comes and goes."""
    if device.startswith("cuda"):
        return {
            "allocator slack": moving // CUDA_SHARE + CUDA_SEGMENT,
            "CUDA context": CUDA_CONTEXT,
        }
    constant = CPU_TRAINING if training else CPU_CONSTANT
    return {"allocator slack": moving // CPU_SHARE + constant}
