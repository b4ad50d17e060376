"""``modelopt-tdq bench zoo``: every class of the zoo from full precision to every backend, and what stops it where.

Read ``stage`` first, then ``model_stages`` and ``deployment_stages`` with ``judge``; ``work`` runs them in a process
that ``apart`` makes; ``command`` and ``present`` keep and write what they found.
"""
