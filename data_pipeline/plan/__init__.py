"""Which sample goes where: shuffle, blend, pack and balance, as a pure function of seed, index, mixture and counters."""
