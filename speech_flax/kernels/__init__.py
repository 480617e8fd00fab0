"""Operations written out for one kind of processor, each beside the plain JAX that defines it."""
