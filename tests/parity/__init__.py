"""Parity with Transformers: random tiny models, the same weights and inputs, the largest difference.

A variant is one line of data in ``variants/``. The expected numbers come twice: stored in ``references/``, made with
Transformers 4.37.2 (so that the suite pins that version and runs without torch), and live from the installed one.

    PYTHONPATH=tests python -m parity.make_references [NAME ...]   # needs transformers==4.37.2, torch, numpy; no JAX
    PYTHONPATH=tests python -m parity.write_table                  # measures everything, writes docs/parity.md
"""
