"""Tests the count of a program's bytes on programs whose bytes are known."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.hlo import array_bytes, parse, traffic


@pytest.mark.parametrize(
    ("shape", "count"),
    [("f32[2,3]{1,0}", 24), ("f8e4m3fn[7]{0}", 7), ("(s32[], u8[4]{0}, f64[2])", 24), ("token[]", 0)],
)
def test_bytes_of_shapes(shape, count):
    assert array_bytes(shape) == count


def compiled(fn, *shapes):
    return parse(jax.jit(fn).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text())


def test_an_elementwise_result_reads_its_operands_and_writes_itself():
    program = compiled(lambda x, y: jnp.exp(x) * y + 1, (64, 32), (64, 32))
    (fusion,) = [found for found in traffic(program) if found[0].opcode == "fusion"]
    assert fusion[1] == 3 * 64 * 32 * 4
    assert "exp" in fusion[0].op_name or "add" in fusion[0].op_name


TEXT = """
HloModule test

%fused (p0: f32[8,100], p1: s32[], p2: f32[100]) -> f32[8,100] {
  %p0 = f32[8,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
  %p2 = f32[100]{0} parameter(2)
  %row = f32[1,100]{1,0} bitcast(%p2)
  %sum = f32[1,100]{1,0} add(%slice, %row)
  ROOT %out = f32[8,100]{1,0} dynamic-update-slice(%p0, %sum, %p1, %zero)
}

ENTRY %main (a: f32[8,100], i: s32[], b: f32[100]) -> f32[8,100] {
  %a = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[100]{0} parameter(2)
  %product = (f32[8,100]{1,0}, s8[50]{0}) custom-call(%a, %b), custom_call_target="gemm", metadata={op_name="f/dot"}
  %first = f32[8,100]{1,0} get-tuple-element(%product), index=0
  ROOT %fusion = f32[8,100]{1,0} fusion(%first, %i, %b), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/add"}
}
"""


def test_slices_and_updates_in_place_count_as_what_they_touch():
    found = {each.name: (each, count) for each, count in traffic(parse(TEXT))}
    assert set(found) == {"product", "fusion"}
    assert found["fusion"][1] == 400 + 4 + 400 + 400  # the slice, the index, the row; the row written
    assert found["product"][1] == 3200 + 400 + 3200 + 50
    assert found["product"][0].op_name == "f/dot"


PRODUCT = """
ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  ROOT %product = (bf16[64,16]{1,0}, s8[50]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
}
"""


def test_a_library_s_product_has_its_flops():
    ((product, _),) = traffic(parse(PRODUCT))
    assert product.flops == 2 * 64 * 32 * 16
    batched = PRODUCT.replace("bf16[64", "bf16[5,64").replace("bf16[32", "bf16[5,32")
    ((product, _),) = traffic(parse(batched))
    assert product.flops == 5 * 2 * 64 * 32 * 16


def test_a_loops_stacked_arrays_are_read_a_slice_at_a_time():
    def sum_of_rows(x):
        return jax.lax.scan(lambda total, row: (total * 0.5 + row, total), jnp.zeros(1000), x)

    program = compiled(sum_of_rows, (50, 1000))
    assert max(count for each, count in traffic(program) if each.opcode == "fusion") <= 50 * 1000 * 4 + 3 * 4000
