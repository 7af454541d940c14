from megatron_taipan.ops.tiles import fit_tiles


def test_powers_of_two_from_16_to_128_fit():
    assert [size for size in range(300) if fit_tiles(size)] == [16, 32, 64, 128]
    assert fit_tiles(64, 128) and not fit_tiles(64, 96) and not fit_tiles(8, 64)
