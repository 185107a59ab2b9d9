import { Panel as Panel_20f31ba41316e98ce604616d2b76e9a2 } from 'movieq-payload/panel'
import { CollectionCards as CollectionCards_f9c02e79a4aed9a3924487c0cd4cafb1 } from '@payloadcms/next/rsc'

/** @type import('payload').ImportMap */
export const importMap = {
  "movieq-payload/panel#Panel": Panel_20f31ba41316e98ce604616d2b76e9a2,
  "@payloadcms/next/rsc#CollectionCards": CollectionCards_f9c02e79a4aed9a3924487c0cd4cafb1
}
