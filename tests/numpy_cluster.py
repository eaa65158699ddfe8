"""Runs the words of `dsa_jax.pallas_kernels.hopper.cluster` in NumPy: the blocks of a cluster as one team in lockstep.

Their shared memories follow each other in the machine's. Races between blocks are seen too: a word that two blocks
touch between two barriers of the cluster, one of them writing.
"""

import numpy as np
import numpy_simt


class Machine(numpy_simt.Machine):
    """Holds the memory of all blocks of a cluster."""

    def __init__(self, blocks, threads, smem_words, seed):
        super().__init__(blocks * threads, blocks * smem_words, seed)
        self.blocks, self.block_threads, self.block_words = blocks, threads, smem_words
        self.block = np.arange(blocks * threads) // threads
        self.phase, self.arrived = 0, False
        # When (in barriers of the cluster) each word was last touched, and by which block (-1: by several).
        self.touched_by_blocks = {kind: np.full((2, len(self.smem)), -1) for kind in self.touched}

    def touch(self, kind, place):
        """Notes that active threads touch their words, and raises if another block has since the last phase."""
        super().touch(kind, place)
        place, block = place[self.active], self.block[self.active]
        for other, (when, who) in self.touched_by_blocks.items():
            if (other, kind) != ("read", "read"):
                race = (when[place] == self.phase) & (who[place] != block)
                assert not race.any(), f"race between blocks: {kind} after {other} of word {place[race][0]}"
        when, who = self.touched_by_blocks[kind]
        alone = (when[place] < self.phase) | (who[place] == block)
        when[place] = self.phase
        who[place] = np.where(alone, block, -1)


def install(patch, machine):
    """Makes `numpy_simt` run this machine."""
    patch.setattr(numpy_simt, "machine", machine, raising=False)
    patch.setattr(numpy_simt, "thread_id", lambda: reg(np.arange(machine.threads) % machine.block_threads))
    patch.setattr(numpy_simt, "smem_address", lambda at: reg(machine.block * (4 * machine.block_words) + at))
    patch.setattr(numpy_simt, "barrier", _barrier_of_block)


def rank():
    """Gives every thread the number of its block."""
    return reg(numpy_simt.machine.block)


def reg(values):
    return numpy_simt.Reg(np.asarray(values).astype(np.uint32))


def _barrier_of_block(number, threads):
    machine = numpy_simt.machine
    machine.together()
    assert threads == machine.block_threads and (number > 0).value.all()
    machine.barriers += 1


def barrier():
    arrive()
    wait()


def arrive():
    machine = numpy_simt.machine
    machine.together()
    assert not machine.arrived
    machine.arrived = True


def wait():
    machine = numpy_simt.machine
    machine.together()
    assert machine.arrived, "wait without arrive"
    machine.arrived = False
    machine.phase += 1
    machine.barriers += 1


def load_from(rank, address, offset=0):
    machine = numpy_simt.machine
    assert not machine.arrived, "others may already write there"
    assert 0 <= rank < machine.blocks
    words = machine.block_words
    own = address.value.astype(np.int64) - machine.block * (4 * words)
    assert (own >= 0).all() and (own + offset < 4 * words).all(), "outside of the block's memory"
    return numpy_simt.load(reg(own + rank * (4 * words)), offset)
