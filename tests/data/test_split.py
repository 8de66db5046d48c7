import torch

from revnet.data import stratified_split


def test_parts_are_disjoint_complete_and_stratified():
    labels = torch.randint(7, (1000,))
    first, second = stratified_split(labels, 0.3, seed=0)
    assert sorted(first + second) == list(range(1000))
    assert first == sorted(first)
    counts = labels.bincount()
    assert torch.equal(labels[second].bincount(), (counts * 0.3).round().long())


def test_the_seed_alone_chooses():
    labels = torch.arange(100) % 4
    torch.manual_seed(1)
    before = stratified_split(labels, 0.2, seed=3)
    torch.manual_seed(2)
    assert stratified_split(labels, 0.2, seed=3) == before
    assert stratified_split(labels, 0.2, seed=4) != before


def test_the_choice_is_the_same_for_ever():
    assert stratified_split(torch.arange(12) % 2, 0.3, seed=0) == ([0, 2, 3, 5, 7, 8, 9, 10], [1, 4, 6, 11])


def test_small_classes_are_in_both_parts_and_single_items_in_the_first():
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 4])
    for fraction in (0.01, 0.99):
        first, second = stratified_split(labels, fraction, seed=0)
        assert labels[first].unique().tolist() == [0, 1, 2, 4]
        assert labels[second].unique().tolist() == [0, 2]
