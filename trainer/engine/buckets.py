"""How many elements travel in one collective: of the sums at stage 0, and of DeepSpeed's buffers above it."""

from __future__ import annotations

SMALLEST, LARGEST = 1 << 18, 1 << 25  # elements of a bucket: 1 and 128 MiB in fp32
ALIGNED = 128  # elements; DeepSpeed takes even buffers only


def bucket_elements(num_params: int) -> int:
    """How many elements are summed at once: a 32nd of the model, so that the last sum, which nothing hides, is small.

    Not below what a collective's latency costs, and not above what keeps a link busy.
    """
    return min(max(num_params // 32, SMALLEST), LARGEST)


def bucket_sizes(num_params: int, stage: int) -> dict[str, int]:
    """Elements of DeepSpeed's communication buffers, as parts of the model.

    DeepSpeed's defaults are 500 M elements (2 GB) for each buffer, and at stage 3 they keep a network of less than a
    billion parameters gathered after its first use: a small model would cost a rank twice what ZeRO promises
    (benchmarks/RESULTS.md). At least 2 M elements (8 MB): below that, sums and gathers cost more than they save. So of
    a network of less than 2 M parameters stage 3 keeps all weights gathered between steps, and a partition group (hpZ)
    has no backward gathers left to spare.
    """
    bucket = _part(num_params, 16 if stage == 3 else 8)
    sizes = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        ahead = _part(num_params, 32)
        sizes |= {
            "stage3_max_live_parameters": ahead,
            "stage3_max_reuse_distance": ahead,
            "stage3_prefetch_bucket_size": ahead,
            "stage3_param_persistence_threshold": min(10_000, ahead),
            "sub_group_size": bucket,
        }
    return sizes


def _part(num_params: int, share: int) -> int:
    elements = min(max(num_params // share, 1 << 21), num_params, 200_000_000)
    return -(-elements // ALIGNED) * ALIGNED
