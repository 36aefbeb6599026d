"""The core's verbs, one module a family of them: parse, call the library, show. They decide nothing themselves.

torch and transformers are loaded only by the verbs that compute with weights (score, eval, verify, prune, export, and
plan where it must score), inside themselves.
"""
