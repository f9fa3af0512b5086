"""Operations worth more than one implementation. Each takes its implementation by name."""
