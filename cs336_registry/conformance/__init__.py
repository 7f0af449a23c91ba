"""The conformance kit: what makes "interchangeable" a claim that anybody can check for anybody's backend.

    pytest --pyargs cs336_registry.conformance --cs336-backend=mine

Every check follows from the contracts; tolerances come from the contracts alone. `mutants/` holds wrong backends, each
with one realistic bug: the kit is judged by catching all of them.
"""
