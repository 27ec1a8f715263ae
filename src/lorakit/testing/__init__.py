"""The conformance suite as a public tool: `check_method` proves a method, `seeded_bugs` proves the suite.

    from lorakit.testing import check_method
    check_method(MyMethod)            # raises AssertionError naming method, layer, dtype and check
"""

from lorakit.testing.conformance import CHECKS, DTYPES, LAYERS, Case, check_method, instances, off_default

__all__ = ["CHECKS", "DTYPES", "LAYERS", "Case", "check_method", "instances", "off_default"]
