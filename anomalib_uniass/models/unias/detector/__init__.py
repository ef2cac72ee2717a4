# SPDX-License-Identifier: Apache-2.0
"""From a reconstruction to anomaly map and score; :mod:`.recipes` says of which parts, in which order."""
