"""The behaviours that torch lacks: one file for each row of ``table.py``, run on torch and on torchkiln.

A row is added, or extended, in ``test_row_NN_words.py``::

    from .table import Impl, row

    @row(2, "pytorch 57784", torch="a read in training mode runs a power iteration")
    def test_02_reading_changes_no_buffer(impl: Impl) -> None:
        layer = impl.N.spectral_norm(nn.Linear(3, 4))
        ...

``impl.P`` and ``impl.N`` are the parametrize and the parametrizations module of one implementation. ``torch=`` is the
reason why torch fails; it makes the test a strict xfail there, so it must fail, with one of ``raises``
(``AssertionError`` unless said otherwise). ``torchkiln=`` says the same of ours, for what is still missing. Where only
some parameters fail, mark those: ``fails_on("torch", reason)`` is a mark for ``pytest.param``.

The table in ``docs/requirements.md`` is written from the outcomes of one run, slow tests included, by

    python -m pytest tests/requirements --requirements-table docs/requirements.md

A row passes on an implementation when all its tests pass there. Nothing is written unless the run is green.
"""
