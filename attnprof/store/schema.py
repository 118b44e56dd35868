"""The tables of a run directory, column by column.

A run directory holds::

    run.json          what was traced, where, and how it ended (`SCHEMA_VERSION` inside)
    journal.jsonl     one line per commit: how many bytes of each table are good
    tables/*.arrows   one Arrow IPC stream per table; each commit appends a record batch

Rows of `ops` are in the order in which ops finished; everything else points at them by row number.
"""

import pyarrow as pa

SCHEMA_VERSION = 1

RUN_FILE = "run.json"
JOURNAL_FILE = "journal.jsonl"
TABLES_DIR = "tables"

# Values of `storage_events.kind`.
BORN = 0
"""An op returned a storage that was not live before."""
FOUND = 1
"""A storage first seen as an operand or by identity: it was made where no op was visible."""
FREED = 2
RESIZED = 3

# Bits of `scopes.flags`.
GRAD_ENABLED = 1
RECOMPUTE = 2
"""The module ran inside backward: a checkpointed forward is being repeated."""
OUTERMOST = 4
COMPILED = 8
"""The module was compiled: fused kernels make storages that no op shows."""
UNCOMPILED = 16
"""The module was compiled, and all the same ran op by op: before torch 2.10, under a trace."""

# Values of `marks.kind`.
STEP = 0
"""`tracer.step()` was called, or an optimizer loop came round: a step ended here."""
OPTIMIZER_BEGIN = 1
OPTIMIZER_END = 2
BACKWARD_BEGIN = 3
BACKWARD_END = 4

# Values of `allocator_events.action` besides those of the allocator itself.
SEED = "seed"
"""A block that was taken before the history began."""
SEGMENT_SEED = "segment_seed"
"""A segment that was reserved before the history began."""
RESUMED = "resumed"
"""The history was off for a while and goes on; seeds follow for all that is there by now."""

SHARED_POOL = (0, 0)
"""What torch calls the pool that everyone shares; others are of CUDA graphs and `MemPool`."""

NO_NODE = -1
"""`ops.node` outside backward. An accumulation into a parameter's gradient is ``-2 - storage``."""

OPS = pa.schema(
    [
        ("time_ns", pa.int64()),  # monotonic clock when the op returned
        ("code", pa.int32()),  # row of `codes`
        ("scope", pa.int32()),  # innermost module call, or -1
        ("thread", pa.int32()),
        ("seq", pa.int64()),  # autograd's sequence number of the newest forward node, per thread
        ("node", pa.int64()),  # sequence number of the backward node that ran it, or NO_NODE
        ("n_in", pa.int32()),  # how many of its rows in `operands` are inputs; they come first
        ("n_out", pa.int32()),
    ]
)
OPERANDS = pa.schema([("storage", pa.int32()), ("signature", pa.int32())])
STORAGE_EVENTS = pa.schema(
    [
        ("storage", pa.int32()),
        ("kind", pa.int8()),
        ("size_bytes", pa.int64()),
        ("address", pa.int64()),
        ("device", pa.int16()),  # row of `devices`
        ("time_ns", pa.int64()),
        ("op", pa.int64()),  # number of ops that had finished
        ("signature", pa.int32()),  # of the tensor through which it was seen, or -1
    ]
)
SIGNATURES = pa.schema(
    [("shape", pa.list_(pa.int64())), ("stride", pa.list_(pa.int64())), ("dtype", pa.string())]
)
CODES = pa.schema(
    [
        ("name", pa.string()),  # "aten::bmm.default"
        ("mutates", pa.bool_()),  # the op writes into an operand
        ("reads_self", pa.bool_()),  # the written operand's old content matters (not out=)
    ]
)
DEVICES = pa.schema([("name", pa.string())])
MODULES = pa.schema(
    [
        ("module", pa.int32()),
        ("root", pa.int32()),  # the module whose `named_modules` gave `path`
        ("path", pa.string()),
        ("class_name", pa.string()),
    ]
)
SCOPES = pa.schema(
    [
        ("scope", pa.int32()),
        ("parent", pa.int32()),
        ("module", pa.int32()),
        ("thread", pa.int32()),
        ("flags", pa.int8()),
        ("enter_op", pa.int64()),  # number of ops that had finished
        ("exit_op", pa.int64()),
        ("enter_ns", pa.int64()),
        ("exit_ns", pa.int64()),
    ]
)
IDENTITIES = pa.schema(
    [
        ("storage", pa.int32()),
        ("role", pa.string()),  # vocabulary.Role
        ("name", pa.string()),
        ("module", pa.int32()),  # owner, or -1
        ("owner", pa.int32()),  # the parameter's storage, for gradients and optimizer state
        ("op", pa.int64()),  # number of ops that had finished when it was noticed
        ("category", pa.string()),  # for tagged storages
        ("layer", pa.string()),  # for tagged storages
    ]
)
MARKS = pa.schema([("kind", pa.int8()), ("time_ns", pa.int64()), ("op", pa.int64())])
SAMPLES = pa.schema(
    [
        ("time_ns", pa.int64()),
        ("device", pa.string()),  # "host", "cuda:0", or "nvml:0" before the program used CUDA
        ("process_bytes", pa.int64()),  # resident set on the host, NVML's process total on a GPU
        ("used_bytes", pa.int64()),
        ("total_bytes", pa.int64()),
    ]
)
ALLOCATOR_EVENTS = pa.schema(
    [
        ("device", pa.int16()),
        ("action", pa.string()),
        ("address", pa.int64()),  # of "oom": how much the device had free
        ("size_bytes", pa.int64()),  # what was asked for, or the block that was taken for it
        ("stream", pa.int64()),
        ("time_ns", pa.int64()),
        ("op", pa.int64()),  # from the allocation's metadata, or -1
    ]
)

PRIVATE_SEGMENTS = pa.schema(  # of CUDA graphs and `torch.cuda.MemPool`, each time segments moved
    [
        ("event", pa.int64()),  # how many rows `allocator_events` had: the segment was there then
        ("device", pa.int16()),
        ("address", pa.int64()),
        ("size_bytes", pa.int64()),
        ("pool", pa.int32()),  # from 1, in the order in which pools were met
    ]
)
ALLOCATOR_CONTEXTS = pa.schema(  # a row per row of `allocator_events`, in a run that has any
    [
        ("stack", pa.int32()),  # row of `stacks`, or -1
        ("category", pa.string()),  # what the recorder of the event called it, or null
        ("metadata", pa.string()),  # what the program tagged it with, or null
    ]
)
STACKS = pa.schema([("frames", pa.list_(pa.int64()))])  # rows of `frames`, innermost first
FRAMES = pa.schema([("filename", pa.string()), ("line", pa.int32()), ("name", pa.string())])
ANNOTATIONS = pa.schema(  # what a program said it was doing
    [
        ("device", pa.int16()),
        ("name", pa.string()),
        ("begins", pa.bool_()),
        ("time_ns", pa.int64()),
    ]
)

BLOCK_TABLES = pa.schema(
    [
        ("op", pa.int64()),  # number of ops that had finished
        ("storage", pa.int32()),  # of the pool that the blocks are in
        ("layers", pa.list_(pa.int64())),  # layer numbers that share the table; empty for all
        ("block_tokens", pa.int64()),
        ("free", pa.int64()),
        ("allocated", pa.int64()),  # distinct blocks that belong to a sequence
        ("used", pa.int64()),  # of these, blocks with at least one token
        ("shared", pa.int64()),  # of these, blocks that belong to several sequences
        ("tokens", pa.int64()),  # of all sequences, those of shared blocks once
        ("sequences", pa.int64()),
        ("blocks", pa.list_(pa.int64())),  # the numbers of those that belong to a sequence
        ("filled", pa.list_(pa.int64())),  # of each, its tokens
        ("owners", pa.list_(pa.int64())),  # of each, how many sequences have it
    ]
)

COUNTED_STEPS = pa.schema(  # of steps whose ops were not recorded; a row per step and device
    [
        ("op", pa.int64()),  # number of ops that had finished
        ("step", pa.int64()),  # 0 for the first of these
        ("device", pa.int16()),
        ("begin_ns", pa.int64()),
        ("end_ns", pa.int64()),
        ("allocated_bytes", pa.int64()),  # when it had ended
        ("peak_bytes", pa.int64()),  # or -1 where the counter still stood at an older peak
        ("reserved_bytes", pa.int64()),
    ]
)

TABLES: dict[str, pa.Schema] = {
    "ops": OPS,
    "operands": OPERANDS,
    "storage_events": STORAGE_EVENTS,
    "signatures": SIGNATURES,
    "codes": CODES,
    "devices": DEVICES,
    "modules": MODULES,
    "scopes": SCOPES,
    "identities": IDENTITIES,
    "marks": MARKS,
    "samples": SAMPLES,
    "allocator_events": ALLOCATOR_EVENTS,
    "private_segments": PRIVATE_SEGMENTS,
    "allocator_contexts": ALLOCATOR_CONTEXTS,
    "stacks": STACKS,
    "frames": FRAMES,
    "annotations": ANNOTATIONS,
    "block_tables": BLOCK_TABLES,
    "counted_steps": COUNTED_STEPS,
}
