"""Where memory is kept: the device it comes from, blocks, and pools of free blocks."""

from bisect import bisect_left, insort
from dataclasses import dataclass

_ADDRESS_BITS = 64


@dataclass(slots=True)
class Device:
    """The device's memory: what the allocator holds of it, and where the next segment goes.

    The driver chooses addresses, and they only decide between free blocks of equal size. Here each
    segment lies above the one before.
    """

    capacity_bytes: int
    reserved_bytes: int = 0
    _next_address: int = 0

    def take(self, size_bytes: int) -> bool:
        """Take memory of the device, if it has so much left."""
        if self.reserved_bytes + size_bytes > self.capacity_bytes:
            return False
        self.reserved_bytes += size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        """Return memory to the device."""
        self.reserved_bytes -= size_bytes

    def place(self, size_bytes: int, alignment_bytes: int) -> int:
        """Return the address of a new range of addresses."""
        address = -(-self._next_address // alignment_bytes) * alignment_bytes
        self._next_address = address + size_bytes
        return address


class Block:
    """A range of a segment: live, free (on its pool's list) or, in expandable segments, unmapped.

    A class with slots rather than a dataclass: a replay makes one per allocation.
    """

    __slots__ = (
        "address",
        "born",
        "is_live",
        "is_mapped",
        "next",
        "pool",
        "previous",
        "requested_bytes",
        "size_bytes",
    )

    def __init__(self, address: int, size_bytes: int, pool: "Pool") -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.pool = pool
        self.previous: Block | None = None  # the neighbours below and above in the same segment
        self.next: Block | None = None
        self.is_live = False
        self.is_mapped = True
        self.requested_bytes = 0
        self.born = 0  # how many searches there had been when it became free: its age

    @property
    def is_split(self) -> bool:
        """Whether the block shares its segment with others."""
        return self.previous is not None or self.next is not None


class Pool:
    """The small or the large pool of one stream: its free blocks, sorted by size and address.

    Torch keeps the blocks of all streams in one set, sorted by stream first. As no search leaves
    its stream, a list per stream finds the same blocks.
    """

    __slots__ = ("_blocks", "_keys", "is_small", "page_bytes", "unmapped")

    def __init__(self, *, is_small: bool, page_bytes: int) -> None:
        self.is_small = is_small
        self.page_bytes = page_bytes
        """What an expandable segment grows by."""
        self.unmapped: list[Block] = []
        """The ranges of expandable segments without memory behind them, sorted by address."""
        # Size and address in one number, because comparing numbers is what makes bisection fast.
        self._keys: list[int] = []
        self._blocks: dict[int, Block] = {}

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def blocks(self) -> list[Block]:
        """The free blocks, smallest first, equal ones by address."""
        return [self._blocks[key] for key in self._keys]

    @property
    def largest_bytes(self) -> int:
        """The size of the largest free block."""
        return self._keys[-1] >> _ADDRESS_BITS if self._keys else 0

    def find(self, size_bytes: int) -> int:
        """Return the position of the smallest free block of ``size_bytes`` or more."""
        return bisect_left(self._keys, size_bytes << _ADDRESS_BITS)

    def at(self, position: int) -> Block:
        """Return the free block at ``position`` of the list."""
        return self._blocks[self._keys[position]]

    def take_at(self, position: int) -> Block:
        """Take the free block at ``position`` off the list."""
        return self._blocks.pop(self._keys.pop(position))

    def add(self, block: Block) -> None:
        """Put a block on the list."""
        key = block.size_bytes << _ADDRESS_BITS | block.address
        insort(self._keys, key)
        self._blocks[key] = block

    def remove(self, block: Block) -> None:
        """Take ``block`` off the list; its size and address must be as they were when added."""
        key = block.size_bytes << _ADDRESS_BITS | block.address
        del self._blocks[key]
        del self._keys[bisect_left(self._keys, key)]


def link(lower: Block | None, upper: Block | None) -> None:
    """Make two blocks neighbours in their segment; None stands for the segment's end."""
    if lower is not None:
        lower.next = upper
    if upper is not None:
        upper.previous = lower


def absorb(block: Block, neighbour: Block) -> None:
    """Make ``block`` cover ``neighbour`` too, which must be off every list."""
    if neighbour is block.previous:
        block.address = neighbour.address
        link(neighbour.previous, block)
    else:
        link(block, neighbour.next)
    block.size_bytes += neighbour.size_bytes


def absorb_free_neighbours(block: Block) -> None:
    """Merge ``block``, which is mapped, with the free blocks beside it."""
    for neighbour in (block.previous, block.next):
        if neighbour is not None and not neighbour.is_live and neighbour.is_mapped:
            block.pool.remove(neighbour)
            absorb(block, neighbour)
