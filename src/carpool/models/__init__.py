"""Experts that are whole models: who answers what, each model loaded once, and when a weak answer may stand.

Rows of a batch are questions or tokens, experts are models, and `carpool.route` with `RouteSpec(top_k=1)` is the
router.
"""
