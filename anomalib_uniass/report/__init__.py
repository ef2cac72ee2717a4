# SPDX-License-Identifier: Apache-2.0
"""Pages to look at: of a test, of a comparison of models, and of an exported model beside its checkpoint."""
