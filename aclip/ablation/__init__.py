"""The paper's tables on one's own data: a set of recipes with several seeds, run and compared."""
