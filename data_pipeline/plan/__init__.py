"""Which sample goes where: shuffle, blend, pack, balance. A pure function of seed, index, mixture and counters."""
