// The page's panels from top to bottom.

import { choicePanel } from "./choice.js";
import { distributionPanel } from "./distributions.js";
import { driftPanel } from "./drift.js";
import { experimentPanel } from "./experiments.js";
import { loupePanel } from "./loupe.js";
import { memoryPanel } from "./memory.js";
import { rolloutPanel } from "./rollouts.js";
import { timelinePanel } from "./timeline.js";
import { trafficPanel } from "./traffic.js";
import { variantsPanel } from "./variants.js";

export const PANELS = [
  trafficPanel,
  choicePanel,
  variantsPanel,
  driftPanel,
  rolloutPanel,
  experimentPanel,
  loupePanel,
  timelinePanel,
  distributionPanel,
  memoryPanel,
];
