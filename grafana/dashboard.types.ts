// What the dashboard must be, in the types of one version of Grafana. The test puts the file in the place
// of DASHBOARD.

import type {
  AnnotationQuery,
  Dashboard,
  DataQuery,
  FieldConfig,
  FieldConfigSource,
  GraphFieldConfig,
  OptionsWithLegend,
  OptionsWithTooltip,
  Panel,
  RowPanel,
  VariableModel,
} from '@grafana/schema';
import type {
  FieldConfig as HeatmapFieldConfig,
  Options as HeatmapOptions,
} from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';

/** An enumeration of strings is its values in JSON. */
type Json<T> = T extends string ? T | `${T}`
  : T extends object ? { [K in keyof T]: Json<T[K]> }
  : T;

/** Prometheus's queries, of which the schema knows only what all data sources share. */
interface PrometheusQuery extends DataQuery {
  expr: string;
  interval?: string;
  range?: boolean;
  editorMode?: 'code' | 'builder';
  format?: 'time_series' | 'heatmap' | 'table';
  legendFormat?: string;
}

/** What Prometheus's annotations have beside the schema's: their form of Grafana 10. */
interface PrometheusAnnotation extends Omit<AnnotationQuery, 'target'> {
  target: PrometheusQuery;
  expr: string;
  step: string;
  titleFormat: string;
  textFormat: string;
  tagKeys: string;
}

/** The first step of thresholds begins at minus infinity, which JSON writes as null. */
interface Thresholds {
  mode: 'absolute';
  steps: { color: string; value: number | null }[];
}

interface Drawn<Custom> extends Omit<FieldConfigSource, 'defaults'> {
  defaults: Omit<FieldConfig, 'custom' | 'thresholds'> & { custom?: Custom; thresholds?: Thresholds };
}

interface Graph extends Omit<Panel, 'type' | 'targets' | 'options' | 'fieldConfig'> {
  type: 'timeseries';
  title: string;
  description: string;
  targets: PrometheusQuery[];
  options: OptionsWithLegend & OptionsWithTooltip;
  fieldConfig: Drawn<GraphFieldConfig>;
}

interface Heatmap extends Omit<Panel, 'type' | 'targets' | 'options' | 'fieldConfig'> {
  type: 'heatmap';
  title: string;
  description: string;
  targets: PrometheusQuery[];
  options: HeatmapOptions;
  fieldConfig: Drawn<HeatmapFieldConfig>;
}

interface Whole extends Omit<Dashboard, 'annotations' | 'panels' | 'templating'> {
  annotations: { list: PrometheusAnnotation[] };
  panels: (Graph | Heatmap | RowPanel)[];
  templating: { list: VariableModel[] };
}

export const dashboard: Json<Whole> = DASHBOARD;
