#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# faiss: one patch in a hundred that occurs many times, and an HNSW index no longer finds half of the others.
#
# A memory bank of patches, searched for the very patches that it holds. With 4,000 different ones the index finds 99.8
# % of them. If 1 % of the bank are copies of one patch (a black background, a saturated reflection), it finds 43 % of
# the rest, at half of the bank 2 %, and answers with patches far away instead: good parts look defective. No error, no
# warning. The graph links copies to one another, at distance 0, until they are a clique that the search cannot leave.
# `IndexFlatL2` finds all; so does HNSW once copies are taken out of the bank.
#
# Guessed before: copies cost time, and a few points of recall. Seen with faiss-cpu 1.15.1, numpy 2.4.6, Python 3.11,
# x86-64, one thread.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    faiss-cpu==1.15.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'EOF'
import faiss
import numpy as np

faiss.omp_set_num_threads(1)


def found(share: float, index: faiss.Index) -> float:
    """Return the share of the patches, copies aside, that are their own nearest neighbour."""
    bank = np.random.default_rng(0).standard_normal((4000, 32)).astype(np.float32)
    bank[: round(share * len(bank))] = 0
    np.random.default_rng(1).shuffle(bank)
    index.add(bank)
    distances, _ = index.search(bank[bank.any(axis=1)], 1)
    return float((distances < 0.01).mean())  # other patches are at 20 and more


shares = (0, 0.01, 0.5)
graph = [found(share, faiss.IndexHNSWFlat(32, 32)) for share in shares]
exact = [found(share, faiss.IndexFlatL2(32)) for share in shares]
assert exact == [1, 1, 1], exact
assert graph[0] > 0.99 and graph[1] < 0.7 and graph[2] < 0.05, graph
print("patches found by HNSW with 0, 1, 50 % copies in the bank:", *(f"{100 * value:.1f} %" for value in graph))
EOF
