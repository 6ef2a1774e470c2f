from tests.stock import declare_operators

declare_operators()
