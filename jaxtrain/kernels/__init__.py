"""Operations with several implementations; each is chosen by name."""
