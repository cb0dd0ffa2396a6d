"""What a pass changed: nodes added, removed and rewritten, against graphs that can be read by eye."""

from prequant.passes import (
    Canonicalize,
    FuseEpilogue,
    FuseParallelLinears,
    Lower,
    Pipeline,
    Program,
    QuantizeWeights,
    SplitOutliers,
    to_networkx,
)
from prequant.view.changes import Changes, changes

from ...models import traced
from ...passes.support import tiny_embedding_program, tiny_mlp_program
from ...passes.toys import Do


def changed(before: Program, *passes: object) -> Changes:
    return changes(to_networkx(before), to_networkx(Pipeline(passes)(before)))  # type: ignore[arg-type]


def canonical() -> Program:
    return Canonicalize()(tiny_mlp_program())


def test_a_dropout_that_goes_is_removed_and_its_reader_rewritten() -> None:
    def drop(program: Program) -> None:
        (node,) = (node for node in program.graph.nodes if node.name == "dropout")
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)

    found = changed(canonical(), Do(drop))
    assert (found.added, found.removed, found.rewritten) == ((), ("dropout",), ("linear_1",))


def test_outliers_are_added_and_their_linears_rewritten() -> None:
    found = changed(canonical(), SplitOutliers(ratio=0.1))
    assert found.added == ("add_outliers_default", "add_outliers_default_1")
    assert found.rewritten == ("linear", "linear_1") and found.removed == ()


def test_codes_are_added_below_the_outliers() -> None:
    found = changed(SplitOutliers(ratio=0.1)(canonical()), QuantizeWeights(bits=4))
    assert found.added == ("dequantize_default", "dequantize_default_1")
    assert set(found.rewritten) == {"add_outliers_default", "add_outliers_default_1"} and found.removed == ()


def test_a_packed_linear_stands_for_the_linear_and_nothing_else_is_rewritten() -> None:
    found = changed(QuantizeWeights(bits=4)(canonical()), Lower())
    assert found.added == ()
    assert set(found.removed) == {"dequantize_default", "dequantize_default_1"}
    assert {name: found.standing_for[name] for name in found.rewritten} == {
        "packed_linear_default": "linear",
        "packed_linear_default_1": "linear_1",
    }
    assert found.standing_for["relu"] == "relu"  # it reads another node of the same value


def test_a_fused_activation_stands_for_the_activation() -> None:
    lowered = Pipeline([QuantizeWeights(bits=4), Lower()])(canonical())
    found = changed(lowered, FuseEpilogue())
    (fused,) = (name for name in found.rewritten if found.standing_for[name] == "relu")
    assert fused.startswith("packed_linear") and found.removed == ("packed_linear_default",)


def test_linears_in_one_op_are_stood_for_by_its_results() -> None:
    lowered = Pipeline([Canonicalize(), QuantizeWeights(bits=4), Lower()])(traced("bert-encoder"))
    found = changed(lowered, FuseParallelLinears())
    fused = [name for name in found.standing_for if name.startswith("getitem")]
    assert len(fused) == 6  # query, key and value of two layers
    assert all(found.standing_for[name].startswith("packed_linear_default") for name in fused)
    assert [name.startswith("packed_linears") for name in found.added] == [True, True]


def test_both_readers_of_a_tied_weight_are_found() -> None:
    before = QuantizeWeights(bits=4)(Canonicalize()(tiny_embedding_program()))
    found = changed(before, Lower())
    assert {found.standing_for[name] for name in found.rewritten} >= {"embedding", "linear", "linear_1"}


def test_nothing_changes_where_nothing_is_done() -> None:
    found = changed(canonical())
    assert (found.added, found.removed, found.rewritten) == ((), (), ())
