"""Recipes shipped with the package, one a use: `longctx finetune NAME`."""
