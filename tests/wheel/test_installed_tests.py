"""The tests of an installed package that need no installation: in the checkout they pass, too, so they stay current."""

from installed_tests import (  # noqa: F401
    net,
    test_a_network_is_saved_and_loaded,
    test_engines_answer_as_the_network,
    test_exits_are_attached_to_a_backbone,
    test_int8_runs,
    test_the_resident_engine_runs,
    x,
)
