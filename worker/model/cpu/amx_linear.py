"""Products in matrix registers (AMX): x · weightᵀ + bias in bfloat16, summed in float32 over 32 columns at a time.

Two registers of weights, of a panel of 32 outputs as packed by linear.py, are multiplied by two of rows. A row has the
same bits among any others; kernels without such registers add in another order.
"""

from __future__ import annotations

from functools import partial

from worker.model.cpu import LANES, amx
from worker.model.cpu.amx import Rows
from worker.model.cpu.code import BFLOAT16, FLOAT32, LINE_BYTES, SIZES, Code, Value
from worker.model.cpu.kernel import Kernel
from worker.model.cpu.pointwise import silu_times

TILE_ROWS = 2 * amx.ROWS                # of x that are multiplied at once
WIDTH = 2 * LANES                       # outputs of a panel
SIZE, WIDE = SIZES[BFLOAT16], SIZES[FLOAT32]
STEP_BYTES = amx.COLUMNS * WIDTH * SIZE # of a panel, multiplied at once
SUMS_BYTES = WIDTH * WIDE               # per row

BLOCK_TILES = 8                         # multiplied by a panel in turn: it is read from memory once for all of them
BLOCK_BYTES = 1 << 20                   # of their rows, at most, so that they stay in a core's cache
BLOCK_STEPS = 8                         # of the panel: they stay in the first-level cache for all tiles
AHEAD_BYTES = 1 << 14                   # of weights prefetched from memory when there is one tile


def block_tiles(num_columns: int) -> int:
    return max(1, min(BLOCK_TILES, BLOCK_BYTES // (TILE_ROWS * num_columns * SIZE)))


@Kernel
def multiply(code: Code, x: Value, weight: Value, bias: Value, out: Value, num_rows: Value, row_stride: Value,
             out_stride: Value, num_steps: Value, num_panels: Value, block_tiles: Value, is_gated: Value) -> None:
    """x of [num_rows, columns], weight as packed, bias of [outputs], out of [num_rows, outputs], or half as many, if
    the first half of each panel are gates.

    A tile has 32 rows, or all if there are fewer; the last tile may overlap the one before.
    """
    x_bytes, out_bytes = row_stride * SIZE, out_stride * SIZE
    panel_bytes = code.select(is_gated.equals(1), LANES * SIZE, code.integer(WIDTH * SIZE))
    num_tiles = (num_rows + (TILE_ROWS - 1)) // TILE_ROWS
    num_blocks = (num_tiles + block_tiles - 1) // block_tiles
    tile_rows = code.larger(code.smaller(num_rows, TILE_ROWS), code.integer(1))
    sums_bytes, panel_stride = code.integer(SUMS_BYTES), code.integer(2 * amx.ROW_BYTES)
    sums = Rows(code.scratch(BLOCK_TILES * TILE_ROWS * SUMS_BYTES // LINE_BYTES), sums_bytes)
    add_up = partial(amx.add_up, code, next_outputs=amx.ROW_BYTES, next_step=STEP_BYTES)

    def first_row(tile: Value) -> Value:
        return code.smaller(tile * TILE_ROWS, num_rows - tile_rows)

    def place_of(panel: Value, tile: Value, i: Value) -> Value:
        return out + (first_row(tile) + i) * out_bytes + panel * panel_bytes

    def ask_for(panel: Value, tile: Value, begin: Value, end: Value) -> None:
        """Prefetches the outputs of these rows of a tile; all at once would take as long as waiting for them."""
        with code.loop(begin, end) as i:
            code.prefetch(place_of(panel, tile, i), LINE_BYTES, is_written=True)

    with amx.registers(code, tile_rows), code.shares(num_blocks * num_panels) as unit:
        panel, block = unit % num_panels, unit // num_panels
        begin, end = (num_tiles * each // num_blocks for each in (block, block + 1))
        weights, biases = Rows(weight + panel * (num_steps * STEP_BYTES), panel_stride), bias + panel * SUMS_BYTES
        is_one = end.equals(begin + 1)
        for num_halves, is_it in ((1, tile_rows <= amx.ROWS), (2, tile_rows > amx.ROWS)):
            with code.when(is_one & is_it):
                ask_for(panel, begin, code.integer(0), tile_rows)
                rows = Rows(x + first_row(begin) * x_bytes, x_bytes)
                add_up(Rows(biases, code.integer(0)), rows, weights, sums, num_steps, num_halves, ahead=AHEAD_BYTES,
                       load=amx.FOR_ONCE)
        with code.when(is_one.equals(0)), code.loop(0, num_steps, BLOCK_STEPS) as step:
            num_left, is_first = code.smaller(num_steps - step, BLOCK_STEPS), step.equals(0)
            with code.loop(begin, end) as tile:
                ask_for(panel, tile, *(tile_rows * each // num_steps for each in (step, step + num_left)))
                rows = Rows(x + first_row(tile) * x_bytes, x_bytes) + step * amx.ROW_BYTES
                so_far = sums + (tile - begin) * (TILE_ROWS * SUMS_BYTES)
                start = Rows(code.select(is_first, biases, so_far.at), code.select(is_first, 0, sums_bytes))
                share = tile % BLOCK_TILES * (STEP_BYTES // BLOCK_TILES)        # each tile prefetches another share
                add_up(start, rows, weights + step * STEP_BYTES, so_far, num_left, 2,
                       ahead=share + BLOCK_STEPS * STEP_BYTES, num_shares=BLOCK_TILES)
        with code.loop(begin, end) as tile, code.loop(0, tile_rows) as i:
            total = sums.row((tile - begin) * TILE_ROWS + i)
            place = place_of(panel, tile, i)
            halves = [code.load(total + j * WIDE, FLOAT32) for j in range(0, WIDTH, LANES)]
            with code.when(is_gated.equals(1)):
                code.store(silu_times(code, *halves), place, BFLOAT16)
            with code.when(is_gated.equals(0)):
                for j, half in enumerate(halves):
                    code.store(half, place + j * (LANES * SIZE), BFLOAT16)
